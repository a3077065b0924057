"""A pipeline folder that is damaged or odd is one line before anything is fitted; what is undone or chosen is said."""

import inspect
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, SchedulerMixin
from safetensors.torch import load_file, save_file

from ctrl_diffusion.prior.families import FAMILIES
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.scheduler import not_followed, read_schedule
from tests.prior.odd import (
    ODD,
    UNET,
    as_variant,
    config,
    flux,
    on,
    put,
    renamed,
    rewrite,
    scheduler,
    sharded,
    tensors,
    text,
    tiny_vae,
    unet,
    weights_of,
    with_added,
)
from tests.prior.priors import PROMPTS, SIZE, condition_of, edit


@pytest.fixture
def odd(folders, tmp_path):
    """Return a changed copy of a family's folder, beside Stable Diffusion's."""

    def made(name, change):
        (tmp_path / "SD 1").symlink_to(folders["SD 1"][0])
        shutil.copytree(folders[name][0], tmp_path / "odd")
        change(tmp_path / "odd")
        return tmp_path / "odd"

    return made


def one_line_of(done):
    """What a command that failed says, but for warnings."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("ctrl: warning: ")]
    assert len(lines) == 1, done.stderr
    assert len(lines[0]) < 700
    return lines[0]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_pipeline_is_one_line_and_nothing_is_written(odd, ctrl_here, tmp_path, name):
    """By `inspect` and `train` alike, with the folder, the part and what to do."""
    family, change, message = ODD[name]
    folder, size, run = odd(family, change), SIZE.get(family, ()), tmp_path / "run"
    (tmp_path / "prompts.txt").write_text("two\n")
    prompts = [] if family in ("DDPM", "DiT") else ["--prompts", tmp_path / "prompts.txt"]
    (tmp_path / "settings.yaml").write_text(f"size: {list(size) or 'null'}\n")
    settings = ["--data", tmp_path, "--control", "dark", "--config", tmp_path / "settings.yaml", *prompts]
    commands = [["inspect", folder, *(["--size", *size] if size else [])]]
    commands += [["train", "--prior", folder, *settings, "--out", run]]
    for command in commands:
        line = one_line_of(ctrl_here(*command))
        assert line.startswith(f"ctrl: {folder}")
        assert re.search(message, line), line
    assert not run.exists()


def seen(folder, name):
    """What a prior says of noise, and the warnings of ours while it was loaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = Prior.from_pretrained(folder, SIZE.get(name))
        prior = prior.with_prompts(PROMPTS) if prior.text else prior
    x = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x_hat = prior.denoiser(x, 0.5, **condition_of(prior))
    ours = [str(w.message) for w in caught if "ctrl_diffusion" in w.filename]
    assert not any("\n" in line for line in ours)
    return x_hat, ours


def all_variants(folder):
    for part in folder.iterdir():
        if list(part.glob("*.safetensors")):
            as_variant(part, "fp16")


def sharded_and_wrapped(part):
    rewrite(part, renamed("module.{}".format))
    sharded(part)


def compiled_inside(tensors):
    return {key.replace("mid_block.", "mid_block._orig_mod."): value for key, value in tensors.items()}


UNDONE = {
    "compiled": ("DDPM", tensors("unet", renamed("_orig_mod.{}".format)), "unet: weights .*prefixes are undone"),
    "DDP": ("DDPM", tensors("unet", renamed("module.{}".format)), "unet: weights .*undone"),
    "both": ("DiT", tensors("transformer", renamed("module._orig_mod.{}".format)), "transformer: weights .*undone"),
    "compiled inside": ("SD 1", tensors("unet", compiled_inside), "unet: weights .*undone"),
    "compiled text": ("SD 1", tensors("text_encoder", renamed("_orig_mod.{}".format)), "text_encoder: .*undone"),
    "DDP text encoder": ("SD 3", tensors("text_encoder_2", renamed("module.{}".format)), "text_encoder_2: .*undone"),
    "a tied weight": ("Flux", tensors("text_encoder_2", renamed("_orig_mod.{}".format)), "text_encoder_2: .*undone"),
    "sharded": ("DDPM", on("unet", sharded_and_wrapped), "unet: weights .*undone"),
    "fp16 alone": ("DDPM", on("unet", as_variant, "fp16"), "variants there are were taken .fp16 of its unet"),
    "bf16 text encoder": ("SD 1", on("text_encoder", as_variant, "bf16"), "taken .bf16 of its text_encoder"),
    "non_ema": ("SD 1", on("unet", as_variant, "non_ema"), "taken .non_ema of its unet"),
    "everything": ("SDXL", all_variants, "taken .fp16 of its unet, fp16 of its vae"),
    "a sharded variant": ("DDPM", on("unet", sharded, "fp16"), "taken .fp16 of its unet"),
    "a sharded variant of text": ("SD 1", on("text_encoder", sharded, "fp16"), "taken .fp16 of its text_encoder"),
    "unused": ("SD 1", with_added("text_encoder", "logit_scale"), "1 weights of the file are not used .*logit_scale"),
    "an EMA beside the weights": ("DDPM", with_added("unet", "ema_decay"), "unet: 1 weights of the file are not used"),
    "plain ones first": ("DDPM", lambda folder: shutil.copy(
        weights_of(folder / "unet"), folder / "unet" / f"{UNET}.fp16.safetensors"), None),
    "sharded plainly": ("SD 1", on("text_encoder", sharded), None),
    "PixArt's class of old": ("PixArt-Sigma", lambda folder: [
        edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"]),
        edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)], None),
    "position_ids of old": ("SD 1", tensors("text_encoder", lambda old: {
        **old, "text_model.embeddings.position_ids": torch.arange(16)[None]}), None),
}  # fmt: skip


@pytest.mark.parametrize("name", UNDONE)
def test_what_is_undone_or_chosen_is_said_once_and_changes_nothing(folders, odd, name):
    family, change, message = UNDONE[name]
    expected, before = seen(folders[family][0], family)
    actual, after = seen(odd(family, change), family)
    assert torch.equal(actual, expected)
    added = [line for line in after if line not in before]
    assert len(added) == (message is not None)
    assert message is None or re.search(message, added[0]), added


def test_no_text_encoder_is_drawn_at_random(folders, odd):
    """Loaded twice it encodes alike; before, a wrapped one was another at every load."""
    folder = odd("SD 1", tensors("text_encoder", renamed("_orig_mod.{}".format)))
    assert torch.equal(seen(folder, "SD 1")[0], seen(folder, "SD 1")[0])


@pytest.mark.parametrize(
    ("name", "change", "size"),
    [
        ("SD 1", config("unet", sample_size=None), (32, 48)),
        ("SDXL", config("unet", sample_size=None), (32, 32)),
        ("DDPM", unet(sample_size=None), (16, 8)),
    ],
)
def test_a_size_that_the_config_does_not_say_is_taken(odd, name, change, size):
    assert Prior.from_pretrained(odd(name, change), size).image_shape == (3, *size)


@pytest.mark.parametrize("options", [{"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, {}])
def test_an_input_made_of_the_text_is_given(odd, options):
    """Neither refused nor unlike: such a network is called as any other."""
    change = (
        text(encoder_hid_dim=16, **options) if options else text(encoder_hid_dim=16, encoder_hid_dim_type="text_proj")
    )
    assert Prior.from_pretrained(odd("SD 1", change)).with_prompts(PROMPTS).classes == 2


def test_a_flow_without_guidance_may_be_distilled(odd):
    """FLUX.1-schnell says so nowhere but there."""
    with pytest.warns(UserWarning, match="given no guidance: if it is one distilled for few steps"):
        Prior.from_pretrained(odd("Flux", flux(guidance_embeds=False)), (32, 48)).with_prompts(PROMPTS)


def asymmetric():
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8), layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 8), layers_per_up_block=1,
        latent_channels=4, norm_num_groups=4, sample_size=32,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("make", [tiny_vae, asymmetric])
def test_autoencoders_of_other_kinds_encode_and_decode(odd, make):
    """A tiny one has no distribution of latents; what it encodes is its latents."""
    vae = make()
    prior = Prior.from_pretrained(odd("SD 1", lambda folder: put(folder, "vae", vae)))
    images = torch.randn(2, *prior.image_shape)
    with torch.no_grad():
        code = vae.encode(images)
        raw = code.latents if make is tiny_vae else code.latent_dist.mode()
        torch.testing.assert_close(prior.encode(images), raw * vae.config.scaling_factor)
        torch.testing.assert_close(prior.decode(raw * vae.config.scaling_factor), vae.decode(raw).sample)


NOT_FOLLOWED = [
    ("DDIMScheduler", {"timestep_spacing": "trailing"}, {}),
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, {
        "timestep_spacing": "leading", "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, {
        "variance_type": "fixed_large"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {
        "timestep_spacing": "linspace", "use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "timestep_spacing": "trailing"}, {"use_beta_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, {"solver_order": 2}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "timestep_spacing": "trailing", "use_lu_lambdas": True}, {
        "use_lu_lambdas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}, {"use_exponential_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.02}, {"shift_terminal": 0.02}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {"stochastic_sampling": True}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "expected"), NOT_FOLLOWED)
def test_settings_that_the_chain_does_not_follow(kind, settings, expected):
    assert not_followed(getattr(diffusers, kind)(**settings)) == expected


def test_inspect_says_which_settings_are_not_followed(folders, odd, ctrl_here):
    folder = odd("DDPM", scheduler("EulerDiscreteScheduler", use_karras_sigmas=True, timestep_spacing="trailing"))
    done = ctrl_here("inspect", folder)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("not followed")]
    assert "use_karras_sigmas True" in line
    assert "EulerDiscreteScheduler" in line
    facts = json.loads(ctrl_here("inspect", folder, "--json").stdout)
    assert facts["not_followed"]["use_karras_sigmas"] is True
    edit(folder / "scheduler" / "scheduler_config.json", use_karras_sigmas=False)
    assert "not followed" not in ctrl_here("inspect", folder).stdout


KINDS = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith(("Flax", "LCM", "TCD"))]
KINDS = [kind for kind in (getattr(diffusers, name) for name in KINDS) if issubclass(kind, SchedulerMixin)]
READ = [kind for kind in KINDS if "beta_schedule" in inspect.signature(kind).parameters]


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_a_schedule_to_zero_snr_is_the_schedulers_own(kind):
    """What a scheduler makes of its betas is in the schedule that is read; where it does nothing, that is said."""
    asked = kind.from_config({"rescale_betas_zero_snr": True, "num_train_timesteps": 1000})
    if not hasattr(asked, "alphas_cumprod") or "prediction_type" not in asked.config:
        with pytest.raises(ValueError, match="no discrete noise schedule"):
            read_schedule(asked, 0)
        return
    schedule = read_schedule(asked, 0).schedule
    torch.testing.assert_close(schedule.table[1:-1], asked.alphas_cumprod[:-1].double(), rtol=0, atol=0)
    reads = "rescale_betas_zero_snr" in inspect.signature(kind).parameters
    # 2⁻²⁴, the floor of some, is that of ᾱ
    assert not reads or float(schedule(1.0)[0]) <= 2**-12
    assert ("rescale_betas_zero_snr" in not_followed(asked)) == (not reads)


def test_settings_of_other_schedulers_mean_nothing(odd):
    """A config keeps what another class wrote: PNDM neither clips nor thresholds, whatever its file says."""
    prior = Prior.from_pretrained(odd("SD 1", scheduler(clip_sample=True, thresholding=True)))
    assert prior.denoiser.clip is None


def single(folder, name, **values):
    """A folder with one file of tensors, or of JSON."""
    folder.mkdir()
    if name.endswith(".json"):
        (folder / name).write_text(json.dumps(values))
    else:
        save_file({"model.diffusion_model.x": torch.zeros(2)}, folder / name)
    return folder


NO_FOLDER = {
    "a file": (lambda t: single(t / "a", "x.safetensors") / "x.safetensors", "x.safetensors is a checkpoint"),
    "a .ckpt": (lambda t: single(t / "a", "x.ckpt") / "x.ckpt", r"x.ckpt is .*from_single_file.*save_pretrained"),
    "gguf": (lambda t: single(t / "a", "q4.gguf") / "q4.gguf", "q4.gguf is a checkpoint in a single file"),
    "a folder of a file": (lambda t: single(t / "a", "x.safetensors"), "x.safetensors is a checkpoint"),
    "a LoRA": (lambda t: single(t / "a", "pytorch_lora_weights.safetensors"), "is of a LoRA. .*fuse_lora"),
    "PEFT's LoRA": (lambda t: single(t / "a", "adapter_model.safetensors"), "is of a LoRA"),
    "a part": (lambda t: single(t / "a", "config.json"), "one part of a pipeline has. Name the folder"),
    "an index": (lambda t: single(t / "a", "model_index.json") / "model_index.json", "index of one. Name the folder"),
    "a modular pipeline": (lambda t: single(t / "a", "modular_model_index.json"), "is a modular pipeline"),
    "nothing": (lambda t: t / "none", "it has no model_index.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FOLDER)
def test_what_is_no_pipeline_folder_is_one_line_with_the_way_out(ctrl_here, tmp_path, name):
    make, message = NO_FOLDER[name]
    path = make(tmp_path)
    training = ["train", "--prior", path, "--data", tmp_path, "--control", "dark", "--out", tmp_path / "run"]
    for command in (["inspect", path], training):
        assert re.search(f"{re.escape(str(path))} is no pipeline folder.*{message}", one_line_of(ctrl_here(*command)))
    assert not (tmp_path / "run").exists()


def test_the_hub_is_asked_for_a_variant_where_it_has_no_plain_weights(folders, monkeypatch):
    asked = []

    def download(name, variant, **options):
        asked.append(variant)
        if variant != "fp16":
            raise OSError("Could not find the necessary `safetensors` weights in {…} (variant=None)")
        return str(folders["DDPM"][0])

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert Prior.from_pretrained("someone/something").pipeline == "DDPMPipeline"
    assert asked == [None, "fp16"]


def test_errors_of_our_own_are_not_taken_for_a_damaged_folder(odd, monkeypatch):
    """Only what a library raises becomes a line."""

    def load(pipeline, size):
        raise AttributeError("ours")

    monkeypatch.setitem(FAMILIES, "DDPMPipeline", SimpleNamespace(load=load, PARTS=("unet",), ALONE=True))
    with pytest.raises(AttributeError, match="ours"):
        Prior.from_pretrained(odd("DDPM", lambda folder: None))


def test_what_a_library_does_not_find_is_a_line(odd, monkeypatch, ctrl_here):
    """A package that is not installed, say: ImportError is no traceback."""

    def from_pretrained(*arguments, **options):
        raise ImportError("T5 needs\nsentencepiece")

    monkeypatch.setattr(diffusers.UNet2DModel, "from_pretrained", from_pretrained)
    assert "its unet: T5 needs sentencepiece" in one_line_of(ctrl_here("inspect", odd("DDPM", lambda folder: None)))


def test_weights_that_were_read_are_the_files(folders):
    """Every name of a file is one of the model's, with its value: nothing is drawn, nothing left on the meta device."""
    prior = Prior.from_pretrained(folders["DDPM"][0])
    stored = load_file(weights_of(folders["DDPM"][0] / "unet"))
    assert stored.keys() == prior.denoiser.network.state_dict().keys()
    assert all(torch.equal(value, stored[name]) for name, value in prior.denoiser.network.state_dict().items())
