"""A LoRA is the same by whatever names it comes, and what is none is refused in a line."""

import copy
import json
import re
import warnings

import pytest
import torch
from pipelines import saved
from safetensors.torch import save_file

from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.run.adapters.names import layers_of
from ctrl_diffusion.run.adapters.policy import AdaptedDenoiser
from ctrl_diffusion.run.adapters.read import read_adapter

FAMILIES = {"SD 1": "StableDiffusionPipeline", "SDXL": "StableDiffusionXLPipeline", "SD 3": "StableDiffusion3Pipeline",
            "Flux": "FluxPipeline"}  # fmt: skip
RANK, ALPHA = 2, 3.0
# float32 sums of the same products, scaled before or after: a few roundings of numbers of size 1
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return {family: saved(family, tmp_path_factory.mktemp("p") / "prior") for family in FAMILIES}


def network_of(pipeline):
    return pipeline.components.get("unet") or pipeline.components["transformer"]


def drawn(network, seed=0, ends=("to_q", "to_v", "to_out.0")):
    """A (r, in) and B (out, r) of the layers of attention with some endings."""
    draw = torch.Generator().manual_seed(seed)
    layers = {name: module.weight for name, module in layers_of(network).items() if name.endswith(ends)}
    return {
        name: (torch.randn(RANK, w.shape[1], generator=draw) / w.shape[1] ** 0.5,
               0.5 * torch.randn(w.shape[0], RANK, generator=draw))
        for name, w in layers.items()
    }  # fmt: skip


def prefix_of(network):
    return "unet" if hasattr(network, "down_blocks") else "transformer"


def peft(matrices, network):
    """As diffusers writes it, α/r multiplied in."""
    out = {}
    for layer, (a, b) in matrices.items():
        out |= {f"{prefix_of(network)}.{layer}.lora_A.weight": a,
                f"{prefix_of(network)}.{layer}.lora_B.weight": ALPHA / RANK * b}  # fmt: skip
    return out


def kohya(matrices, network):
    """As kohya's scripts write it for a network with diffusers' names."""
    out = {}
    for layer, (a, b) in matrices.items():
        stem = f"lora_unet_{layer.replace('.', '_')}"
        out |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(ALPHA)}
    return out


def old_diffusers(matrices, network):
    """As diffusers wrote it once, in the processors of attention."""
    out = {}
    for layer, (a, b) in matrices.items():
        stem, _, end = layer.rpartition(".attn")
        where, _, name = f"attn{end}".partition(".")
        stem = f"{prefix_of(network)}.{stem}.{where}.processor.{name.removesuffix('.0')}_lora"
        out |= {f"{stem}.down.weight": a, f"{stem}.up.weight": ALPHA / RANK * b}
    return out


def own(matrices, network):
    """As PEFT itself writes it, whose α is in a config beside the file."""
    return {f"base_model.model.{layer}.lora_{name}.weight": tensor
            for layer, pair in matrices.items() for name, tensor in zip("AB", pair, strict=True)}  # fmt: skip


NAMES = {"kohya": kohya, "old diffusers": old_diffusers, "peft itself": own}
CELLS = [(family, names) for family in FAMILIES for names in NAMES
         if names != "old diffusers" or family in ("SD 1", "SDXL")]  # fmt: skip


def written(folder, tensors, name="lora.safetensors", **about):
    folder.mkdir(exist_ok=True)
    save_file(
        {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()},
        folder / name,
        about or None,
    )
    return folder / name


def read(path, pipeline, family):
    return read_adapter(path, network_of(pipeline), FAMILIES[family])


def assert_same(one, other):
    """Equal differences of equal layers: all that a distance depends on."""
    assert one.weights.keys() == other.weights.keys()
    for layer, delta in one.weights.items():
        torch.testing.assert_close(delta, other.weights[layer], **CLOSE)
        assert delta.any()


@pytest.mark.parametrize(("family", "names"), CELLS)
def test_the_names_of_a_lora_do_not_matter(pipelines, tmp_path, family, names):
    pipeline = pipelines[family]
    network = network_of(pipeline)
    matrices = drawn(network)
    path = written(tmp_path / "peft", peft(matrices, network))
    if names == "peft itself":
        other = written(tmp_path / "b", NAMES[names](matrices, network), "adapter_model.safetensors")
        (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    else:
        other = written(tmp_path / "b", NAMES[names](matrices, network))
    expected = read(path, pipeline, family)
    assert_same(expected, read(other, pipeline, family))
    assert len(expected.weights) == len(matrices)
    assert expected.ranks == (RANK,)


def test_alpha_is_read_from_the_header_of_diffusers(pipelines, tmp_path):
    """Of all layers, of one by its pattern, and 1 of a file without any, which is said."""
    network = network_of(pipelines["SD 1"])
    tensors = peft(drawn(network), network)
    read_ = {}
    for name, about in {"none": {}, "all": {"unet.lora_alpha": 3.0}, "one": {"unet.lora_alpha": 3.0,
                        "unet.alpha_pattern": {"attn1.to_q": 5.0}}}.items():  # fmt: skip
        header = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, **about})} if about else {}
        read_[name] = read(written(tmp_path / name, tensors, **header), pipelines["SD 1"], "SD 1")
    assert "scale 1 is taken" in read_["none"].notes[0]
    assert read_["all"].notes == ("its scale is that of its header",)
    for layer, delta in read_["none"].weights.items():
        torch.testing.assert_close(read_["all"].weights[layer], 3 / RANK * delta)
        alpha = 5 if layer.endswith("attn1.to_q") else 3
        torch.testing.assert_close(read_["one"].weights[layer], alpha / RANK * delta)


@pytest.mark.parametrize(("text", "reason"), [("{", "is damaged"), ("[1]", "must be settings by name, got list")])
def test_a_damaged_header_is_refused_in_a_line(pipelines, tmp_path, text, reason):
    network = network_of(pipelines["SD 1"])
    path = written(tmp_path, peft(drawn(network), network), lora_adapter_metadata=text)
    with pytest.raises(ValueError, match=rf"lora.safetensors: lora_adapter_metadata in its header {reason}"):
        read(path, pipelines["SD 1"], "SD 1")


def flux_of_its_authors(matrices):
    """Kohya's names of Flux's first code, whose q, k and v are one matrix; A is shared, so B is stacked."""
    names = {"attn.to": "img_attn_qkv", "attn.add": "txt_attn_qkv"}
    out = {}
    for start, name in names.items():
        q, k, v = (f"transformer_blocks.0.{start}_{x}{'_proj' if 'add' in start else ''}" for x in "qkv")
        stem = f"lora_unet_double_blocks_0_{name}"
        out |= {f"{stem}.lora_down.weight": matrices[q][0], f"{stem}.alpha": torch.tensor(ALPHA),
                f"{stem}.lora_up.weight": torch.cat([matrices[x][1] for x in (q, k, v)])}  # fmt: skip
    return out


def test_the_names_of_fluxs_first_code_are_converted(pipelines, tmp_path):
    network = network_of(pipelines["Flux"])
    drawn_ = drawn(network, ends=("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"))
    matrices = {layer: pair for layer, pair in drawn_.items() if layer.startswith("transformer_blocks")}
    for start in ("attn.to_q", "attn.add_q_proj"):
        shared = matrices[f"transformer_blocks.0.{start}"][0]
        for x in "kv":
            layer = f"transformer_blocks.0.{start.replace('_q', f'_{x}')}"
            matrices[layer] = (shared, matrices[layer][1])
    ours = read(written(tmp_path / "a", peft(matrices, network)), pipelines["Flux"], "Flux")
    theirs = read(written(tmp_path / "b", flux_of_its_authors(matrices)), pipelines["Flux"], "Flux")
    assert_same(ours, theirs)
    assert theirs.notes == ("its names were converted by diffusers' FluxPipeline",)


def test_the_names_of_sdxls_first_code_are_converted(pipelines, tmp_path):
    """Kohya's names: one number for blocks and their layers together."""
    network = network_of(pipelines["SDXL"])
    matrices = drawn(network)
    places = {
        "down_blocks_1_attentions_0": "input_blocks_3_1", "mid_block_attentions_0": "middle_block_1",
        "up_blocks_0_attentions_0": "output_blocks_0_1", "up_blocks_0_attentions_1": "output_blocks_1_1",
    }  # fmt: skip
    tensors = kohya(matrices, network)
    for theirs, ours in places.items():
        tensors = {key.replace(theirs, ours): tensor for key, tensor in tensors.items()}
    ours = read(written(tmp_path / "a", peft(matrices, network)), pipelines["SDXL"], "SDXL")
    theirs = read(written(tmp_path / "b", tensors), pipelines["SDXL"], "SDXL")
    assert_same(ours, theirs)
    assert theirs.notes == ("its names were converted by diffusers' StableDiffusionXLPipeline",)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_with_a_lora_says_what_diffusers_says_with_it(pipelines, tmp_path, family):
    """`load_lora_weights` of the stock pipeline on the same file; and the base itself is as it was before."""
    size = (32, 32) if family == "Flux" else None
    base = Prior.from_pipeline(copy.deepcopy(pipelines[family]), FAMILIES[family], size)
    guidance = 3.5 if family == "Flux" else 1.0
    prior = base.with_prompts(["a seven", "two"], guidance)
    network = prior.denoiser.network
    path = written(tmp_path, peft(drawn(network), network))
    adapted = AdaptedDenoiser(prior.denoiser, read_adapter(path, network, FAMILIES[family]))
    stock = copy.deepcopy(pipelines[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.load_lora_weights(tmp_path, weight_name=path.name)
    theirs = Prior.from_pipeline(stock, FAMILIES[family], size)
    theirs = theirs.with_prompts(["a seven", "two"], guidance).denoiser
    x_t = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = prior.denoiser(x_t, 0.5, c=torch.arange(2))
        expected = theirs(x_t, 0.5, c=torch.arange(2))
        torch.testing.assert_close(adapted(x_t, 0.5, c=torch.arange(2)), expected, **CLOSE)
        assert torch.equal(prior.denoiser(x_t, 0.5, c=torch.arange(2)), before)
    assert (expected - before).abs().max() > 1e-3


def one(network, change=lambda tensors: tensors):
    return change(peft(dict([next(iter(drawn(network).items()))]), network))


def with_keys(**more):
    return lambda tensors: tensors | {key.replace("__", "."): value for key, value in more.items()}


def narrower(tensors):
    return {key: t[:, :-1] if "lora_A" in key else t for key, t in tensors.items()}


ONE = torch.ones(2, 2)
BAD = {
    "text encoder": (with_keys(lora_te_text_model_encoder__lora_down__weight=ONE), "also changes a text encoder (1"),
    "text encoder of PEFT": (with_keys(text_encoder__q_proj__lora_A__weight=ONE), "text_encoder.q_proj.lora_A.weight"),
    "unmapped": (
        with_keys(**{f"unet__nowhere_{i}__lora_A__weight": ONE for i in range(5)}),
        "5 of its 7 keys mean no layer of this model (unet.nowhere_0.lora_A.weight, unet.nowhere_1.lora_A.weight, "
        "unet.nowhere_2.lora_A.weight and 2 more). Name the base",
    ),
    "another base": (narrower, "it was made for another base"),
    "DoRA": (with_keys(unet__conv_in__dora_scale=ONE), "is a DoRA"),
    "LoHa": (with_keys(lora_unet_conv_in__hada_w1_a=ONE), "is a LoHa"),
    "LoKr": (with_keys(lora_unet_conv_in__lokr_w1=ONE), "is a LoKr"),
    "no LoRA": (lambda _: {"conv_in.weight": ONE}, "is no LoRA: none of its 1 tensors"),
    "one matrix": (lambda t: {key: v for key, v in t.items() if "lora_A" in key}, "lacks the other matrix"),
    "not finite": (lambda t: {key: v.fill_(torch.nan) for key, v in t.items()}, "numbers that are not finite"),
    "no bias": (with_keys(lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q__diff_b=torch.ones(16)),
                "a shift of a bias, and that layer of the base has no bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_one_line(pipelines, tmp_path, name):
    change, reason = BAD[name]
    network = network_of(pipelines["SD 1"])
    path = written(tmp_path, one(network, change))
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        read(path, pipelines["SD 1"], "SD 1")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora.ckpt", "is a pickle, which can run any code"),
        ("lora.pt", "is a pickle, which can run any code"),
        ("lora.safetensors", "is no safetensors file"),
        ("none.safetensors", "there is no such file"),
        (".", "is a folder"),
    ],
)
def test_other_files_are_refused_before_they_are_read(pipelines, tmp_path, name, reason):
    for written_name in ("lora.ckpt", "lora.pt", "lora.safetensors"):
        (tmp_path / written_name).write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=reason):
        read(tmp_path / name, pipelines["SD 1"], "SD 1")


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_convolutions_full_differences_and_biases_are_added(pipelines, tmp_path, strength):
    """W + s (BA α/r + D) and b + s d, of a file with all three; the sums themselves are checked."""
    network = network_of(pipelines["SD 1"])
    layer = "mid_block.resnets.0.conv1"
    conv = network.get_submodule(layer)
    draw = torch.Generator().manual_seed(1)
    out, inner, *size = conv.weight.shape
    a, b = torch.randn(RANK, inner, *size, generator=draw), torch.randn(out, RANK, 1, 1, generator=draw)
    full, bias = torch.randn(conv.weight.shape, generator=draw), torch.randn(out, generator=draw)
    stem = f"lora_unet_{layer.replace('.', '_')}"
    path = written(tmp_path, {
        f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(ALPHA),
        f"{stem}.diff": full, f"{stem}.diff_b": bias,
    })  # fmt: skip
    prior = Prior.from_pipeline(pipelines["SD 1"], FAMILIES["SD 1"])
    adapted = AdaptedDenoiser(prior.denoiser, read(path, pipelines["SD 1"], "SD 1"), strength)
    x = torch.randn(1, inner, 4, 4, generator=draw)
    with torch.no_grad(), adapted._added():
        theirs = conv(x)
    weight = conv.weight + strength * (ALPHA / RANK * torch.einsum("rixy,or->oixy", a, b[..., 0, 0]) + full)
    expected = torch.nn.functional.conv2d(x, weight, conv.bias + strength * bias, padding=1)
    # 144 products each, of size up to ten
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-3)
