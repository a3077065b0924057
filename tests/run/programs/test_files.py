"""Files that other programs load: none of their keys is left over, and the network then says what ours says."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from pipelines import LARGE, saved
from safetensors import safe_open
from safetensors.torch import load_file

from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.plain import PlainLoRA
from ctrl_diffusion.prior.families import flux, stable_diffusion, stable_diffusion_3
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.run.programs.files import write_files
from ctrl_diffusion.run.programs.table import PROGRAMS, chosen
from tests.run.programs.readers import READERS, apply, grouped, token_width

FAMILIES = {"SD 1": "StableDiffusionPipeline", "SDXL": "StableDiffusionXLPipeline", "SD 2": "StableDiffusionPipeline",
            "SD 3": "StableDiffusion3Pipeline", "Flux": "FluxPipeline", "AuraFlow": "AuraFlowPipeline",
            "Z-Image": "ZImagePipeline"}  # fmt: skip
PAINTING = ("comfyui", "a1111", "invokeai")
CELLS = [(p, f) for p in PAINTING for f in FAMILIES if not PROGRAMS[p].reason(FAMILIES[f])]
# float32 sums of the same terms in another order: the shift is added to a bias or to the layer's output
CLOSE = {"rtol": 0, "atol": 1e-5}
SIZE = dict.fromkeys(LARGE, (32, 32))
BIASED = "the layer whose bias is shifted"
LEVELS = ("0.5", "1.0", "1.5")


def prepared(pipeline, family):
    """A prior of two prompts without guidance, which would scale rounding errors."""
    prior = Prior.from_pipeline(pipeline, FAMILIES[family], SIZE.get(family))
    return prior.with_prompts(["a seven", "two"], 3.5 if family == "Flux" else 1.0)


def randomised(control, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameters in control.parameter_groups().values():
            for p in parameters:
                p += 0.2 * torch.randn(p.shape, generator=draw)
        control.table.weight[-1] = 0
    return control


def predicted(prior, n=2):
    """The network's own output on the same inputs."""
    draw = torch.Generator().manual_seed(5)
    x_t = torch.randn(n, *prior.denoiser.shape, generator=draw)
    with torch.no_grad():
        return prior.denoiser.call(x_t, torch.tensor([300.0, 700.0]), c=torch.arange(2))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return {family: saved(family, tmp_path_factory.mktemp("p") / "prior") for family in FAMILIES}


def made(pipelines, family, folder, programs, **options):
    """A control on a copy of the pipeline, and its files; the pipeline itself stays as it was."""
    prior = prepared(copy.deepcopy(pipelines[family]), family)
    values = LEVELS if options.get("scale") else ("no", "yes")
    if targets := options.pop("targets", None):
        options["targets"] = [prior.denoiser.site.biased if name == BIASED else name for name in targets]
    control = randomised(LoRAControl("dark", values, prior.denoiser, rank=2, **options))
    network, schedule = prior.denoiser.network, prior.denoiser.schedule
    written = write_files(folder, [control], network, schedule, FAMILIES[family], 1.0, programs)
    return prior, control, written[0]


@pytest.mark.parametrize(
    ("program", "family", "options"),
    [
        pytest.param(*cell, given, marks=pytest.mark.slow if given and cell[1] not in ("SD 1", "Flux") else ())
        for given in ({}, {"alpha": 8.0}, {"targets": ["to_k", BIASED]}, {"targets": ["to_q"]})
        for cell in CELLS
    ],
)
def test_a_file_does_what_the_control_does(pipelines, tmp_path, program, family, options):
    """For every y, by the program's own formula."""
    prior, control, written = made(pipelines, family, tmp_path, [program], **options)
    for y, value in enumerate(control.values):
        other = prepared(copy.deepcopy(pipelines[family]), family)
        tensors = load_file(tmp_path / "lora" / f"{written.files[value]}.safetensors")
        before = predicted(other)
        assert apply(tensors, other.denoiser.network, program) == []
        with torch.no_grad(), control.active(torch.full((2,), y)):
            ours = predicted(prior)
        torch.testing.assert_close(predicted(other), ours, **CLOSE)
        assert (ours - before).abs().max() > 1e-2
        if program == "invokeai":
            assert token_width(tensors) == other.denoiser.network.config.cross_attention_dim


@pytest.mark.parametrize(("program", "family"), CELLS)
def test_a_slider_reads_its_strength_as_the_label(pipelines, tmp_path, program, family):
    """At five strengths, exactly where the embeddings of the levels lie on a line."""
    prior = prepared(copy.deepcopy(pipelines[family]), family)
    control = randomised(LoRAControl("ink", LEVELS, prior.denoiser, rank=2, scale=True))
    with torch.no_grad():
        control.table.weight[1] = (control.table.weight[0] + control.table.weight[2]) / 2
    network, schedule = prior.denoiser.network, prior.denoiser.schedule
    (written,) = write_files(tmp_path, [control], network, schedule, FAMILIES[family], 1.0, [program])
    # a level half-way between two float32 numbers is rounded once
    assert written.deviation < 1e-6
    first, slider = (tmp_path / "lora" / f"{name}.safetensors" for name in (written.files[""], written.slider))
    for strength in (0.0, 0.25, 0.5, 0.9, 1.0):
        other = prepared(copy.deepcopy(pipelines[family]), family)
        assert apply(load_file(first), other.denoiser.network, program) == []
        assert apply(load_file(slider), other.denoiser.network, program, strength) == []
        with torch.no_grad(), control.active(torch.full((2,), strength * (len(LEVELS) - 1))):
            ours = predicted(prior)
        torch.testing.assert_close(predicted(other), ours, **CLOSE)
    with safe_open(slider, "pt") as file:
        assert {k: v for k, v in file.metadata().items() if "strength" in k} == {
            "ctrl_at_strength_0": "0.5", "ctrl_at_strength_1": "1.5",
        }  # fmt: skip
    if program == "invokeai":
        assert token_width(load_file(slider)) == prior.denoiser.network.config.cross_attention_dim


@pytest.mark.parametrize("bend", [0.0, 0.5])
def test_the_deviation_of_a_slider_is_measured(pipelines, tmp_path, bend):
    """A middle level that lies off the line by a share of its length, at a right angle."""
    prior = prepared(copy.deepcopy(pipelines["SD 1"]), "SD 1")
    control = LoRAControl("ink", LEVELS, prior.denoiser, rank=2, scale=True)
    with torch.no_grad():
        control.table.weight[2, 0] = 2.0
        control.table.weight[1, 0], control.table.weight[1, 1] = 1.0, 2.0 * bend
    arguments = prior.denoiser.network, prior.denoiser.schedule, FAMILIES["SD 1"], 1.0, ["comfyui"]
    (written,) = write_files(tmp_path, [control], *arguments)
    assert written.deviation == pytest.approx(bend)
    control.scale_as_lora(0.5)
    expected = torch.zeros(3, control.table.weight.shape[1])
    expected[:, 0] = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(control.table.weight[:3], expected)


@pytest.mark.parametrize("program", PAINTING)
def test_files_of_two_controls_add(pipelines, tmp_path, program):
    prior = prepared(copy.deepcopy(pipelines["SD 1"]), "SD 1")
    controls = [randomised(LoRAControl(name, ("no", "yes"), prior.denoiser, 2, i), i) for i, name in enumerate("ab")]
    arguments = prior.denoiser.network, prior.denoiser.schedule, FAMILIES["SD 1"], 1.0, [program]
    written = write_files(tmp_path, controls, *arguments)
    other = prepared(copy.deepcopy(pipelines["SD 1"]), "SD 1")
    for files in written:
        tensors = load_file(tmp_path / "lora" / f"{files.files['yes']}.safetensors")
        assert apply(tensors, other.denoiser.network, program) == []
    y = torch.ones(2, dtype=torch.long)
    with torch.no_grad(), controls[0].active(y), controls[1].active(y):
        ours = predicted(prior)
    torch.testing.assert_close(predicted(other), ours, **CLOSE)


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param(family, given, marks=pytest.mark.slow if given and family not in ("SD 1", "Flux") else ())
        for given in ({}, {"alpha": 8.0}, {"targets": ["to_k", BIASED]}, {"scale": True})
        for family in FAMILIES
    ],
)
def test_diffusers_obeys_its_files(pipelines, tmp_path, family, options):
    """`load_lora_weights` of the stock pipeline, for every y, and of a slider at a strength."""
    prior, control, written = made(pipelines, family, tmp_path, ["diffusers"], **options)
    for y, value in enumerate(control.values if not control.scale else [""]):
        pipeline = copy.deepcopy(pipelines[family])
        name = f"{written.files[value]}.safetensors"
        pipeline.load_lora_weights(tmp_path / "diffusers", weight_name=name, adapter_name="dark")
        if control.scale:
            name = f"{written.slider}.safetensors"
            pipeline.load_lora_weights(tmp_path / "diffusers", weight_name=name, adapter_name="slider")
            pipeline.set_adapters(["dark", "slider"], [1.0, 0.75])
            first, last = (control.table.weight[i].clone() for i in (0, 2))
            with torch.no_grad():
                control.table.weight[1] = (first + last) / 2
            y = 1.5
        with torch.no_grad(), control.active(torch.full((2,), y)):
            ours = predicted(prior)
        torch.testing.assert_close(predicted(prepared(pipeline, family)), ours, **CLOSE)


REAL = {  # the shapes that matter to names; weights on the meta device
    "SD 1": lambda: UNet2DConditionModel(cross_attention_dim=768),
    "SDXL": lambda: UNet2DConditionModel(
        block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
    ),
    "SD 3": lambda: SD3Transformer2DModel(num_layers=24, pos_embed_max_size=192),
    "Flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
}  # fmt: skip
TARGETS = {"SD 1": stable_diffusion, "SDXL": stable_diffusion, "SD 3": stable_diffusion_3, "Flux": flux}


@pytest.mark.parametrize(("program", "family"), [cell for cell in CELLS if cell[1] in REAL])
def test_no_key_of_the_real_networks_is_left_over(program, family):
    """By name, with every layer that is adapted by default."""
    with torch.device("meta"):
        network = REAL[family]()
        ends = TARGETS[family].TARGETS
        layers = {n: m for n, m in network.named_modules() if any(f".{n}".endswith(f".{end}") for end in ends)}
        biased = "time_embedding.linear_2" if "SD" in family and family != "SD 3" else None
        biased = biased or "time_text_embed.timestep_embedder.linear_2"
        layer = network.get_submodule(biased)
        down = {n: torch.empty(1, m.in_features) for n, m in layers.items()}
        up = {n: torch.empty(m.out_features, 1) for n, m in layers.items()}
        lora = PlainLoRA(down, up, 1.0, biased, torch.empty(layer.out_features), tuple(layer.weight.shape))
        assert PROGRAMS[program].reason(FAMILIES[family], [*down, biased]) == ""
        tensors = PROGRAMS[program].layouts[FAMILIES[family]](lora, network)
    assert len(layers) > 100
    keyed, unknown = grouped(tensors)
    found = [READERS[program](key, network) for key in keyed]
    assert unknown == []
    assert None not in found
    assert len({id(module) for module in found}) == len(keyed) == len(layers) + 1


def test_what_a_program_cannot_take_is_refused_in_a_line():
    with pytest.raises(ValueError, match="--for a1111: it does not run Flux"):
        chosen(["comfyui", "a1111"], "FluxPipeline")
    with pytest.raises(ValueError, match="it loads no LoRA of a DDPMPipeline"):
        chosen(["all"], "DDPMPipeline")
    with pytest.raises(ValueError, match="must be one of diffusers, comfyui, a1111, invokeai, all"):
        chosen(["forge"], "FluxPipeline")
    with pytest.raises(ValueError, match=r"--for a1111: it does not map add_embedding\.linear_2, which lora_targets"):
        chosen(["a1111"], "StableDiffusionXLPipeline", ["mid_block.attentions.0.proj_in", "add_embedding.linear_2"])
    for name in ("comfyui", "a1111", "invokeai"):
        with pytest.raises(ValueError, match=f"--for {name}: what it reads of a LoRA of this model was not looked up"):
            chosen([name], "ZImagePipeline")
    with pytest.raises(ValueError, match="--for diffusers: it loads no LoRA of a PixArtSigmaPipeline"):
        chosen(["diffusers"], "PixArtSigmaPipeline")
    able, lines = chosen(["all"], "FluxPipeline")
    assert able == ["diffusers", "comfyui"]
    assert [line.split(":")[0] for line in lines] == ["not for a1111", "not for invokeai"]


def test_values_have_files_of_their_own_whatever_their_names(pipelines, tmp_path):
    """On systems that ignore case too, and in A1111's angle brackets."""
    prior = prepared(copy.deepcopy(pipelines["SD 1"]), "SD 1")
    control = LoRAControl("a look", ("Dark: red/blue", "dark_ red_blue", "slider"), prior.denoiser, rank=2)
    arguments = prior.denoiser.network, prior.denoiser.schedule, FAMILIES["SD 1"], 1.0, ["a1111"]
    (written,) = write_files(tmp_path, [control], *arguments)
    names = list(written.files.values())
    assert names[0] == "a_look-Dark_red_blue"
    assert len({name.casefold() for name in names}) == 3
    assert not any(set(name) & set('<>:"/\\|?* ') for name in names)
    assert {path.stem for path in (tmp_path / "lora").iterdir()} == set(names)
    with safe_open(tmp_path / "lora" / f"{names[2]}.safetensors", "pt") as file:
        assert file.metadata()["ctrl_value"] == "slider"
