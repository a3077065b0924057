"""A run leaves as a pipeline that diffusers loads where nothing of ours is installed."""

import json
import os
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DModel
from huggingface_hub import HfApi
from PIL import Image
from pipelines import BUILDERS
from safetensors.torch import load_file

from ctrl_diffusion.commands.jobs.export import export
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.run.pipeline import ControlledPipeline
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.progress import JobOptions
from tests.commands.families import run_on
from tests.prior.odd import as_variant, renamed, rewrite, weights_of

LONG = ("SD 2", "SDXL", "SD 3", "DiT", "PixArt-alpha", "PixArt-Sigma", "AuraFlow")  # they take the paths of others
# in a process of its own: the package cannot be imported, and says so if it is
LOADED = """
import sys
sys.modules["ctrl_diffusion"] = None
import json, numpy as np, torch
from diffusers import DiffusionPipeline
out, asked, result = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
drawn = {}
for name, given in json.loads(asked).items():
    images = pipe(**given, generator=torch.Generator().manual_seed(3)).images
    drawn[name] = np.stack([np.asarray(image) for image in images])
np.savez(result, **drawn)
"""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in BUILDERS])
def test_an_exported_run_draws_the_same_images_without_us(finished, ctrl_here, tmp_path, name):
    """With the control, at another strength, and without it: byte for byte what `ctrl sample` writes."""
    (run, config), out = run_on(name, finished, tmp_path), tmp_path / "out"
    done = ctrl_here("export", run, out)
    assert (done.returncode, done.stderr) == (0, "")
    condition, asked = [], {}
    if config["prompts"]:
        condition, asked = ["--class", "a nine"], {"prompt": "a nine"}
    elif config["classes"]:
        condition, asked = ["--class", 3], {"class_labels": 3}
    wanted = {
        "controlled": (["--set", "dark=yes"], {"controls": {"dark": "yes"}}),
        "stronger": (["--set", "dark=yes", "--strength", 1.5], {"controls": {"dark": "yes"}, "control_strength": 1.5}),
        "null": ([], {}),
    }
    calls = {key: {**asked, **given, "num_images_per_prompt": 2} for key, (_, given) in wanted.items()}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", LOADED, out, json.dumps(calls), tmp_path / "drawn.npz"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    drawn = np.load(tmp_path / "drawn.npz")
    for key, (options, _) in wanted.items():
        folder = tmp_path / key
        assert (
            ctrl_here("sample", run, *condition, *options, "-n", 2, "--seed", 3, "--quiet", "--out", folder).returncode
            == 0
        )
        ours = np.stack([np.asarray(Image.open(folder / f"0000{i}.png")) for i in range(2)])
        assert np.array_equal(drawn[key], ours), key
    assert not np.array_equal(drawn["controlled"], drawn["null"])
    assert json.loads((out / "model_index.json").read_text())["flags"] == {
        key: value for key, value in json.loads((tmp_path / "prior" / "model_index.json").read_text()).items()
        if isinstance(value, bool)
    }  # fmt: skip
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "{{" not in card
    assert (out / "grid.png").is_file()


@pytest.mark.parametrize(
    "change", [lambda part: as_variant(part, "fp16"), lambda part: rewrite(part, renamed("module.{}".format))]
)
def test_what_was_chosen_or_undone_at_the_border_is_exported_plainly(finished, ctrl_here, tmp_path, change):
    """diffusers finds the weights in the exported folder by their usual names."""
    run, _ = run_on("DDPM", finished, tmp_path)
    stored = load_file(weights_of(tmp_path / "prior" / "unet"))
    expected = {name: value.clone() for name, value in stored.items()}  # the file under them is written over
    change(tmp_path / "prior" / "unet")
    assert ctrl_here("export", run, tmp_path / "out").returncode == 0
    loaded = UNet2DModel.from_pretrained(tmp_path / "out" / "unet", use_safetensors=True).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def opened(out, **options):
    """The exported pipeline in this process, as diffusers loads its parts."""
    parts = StableDiffusionPipeline.from_pretrained(out.parent / "prior", **options).components
    index = json.loads((out / "model_index.json").read_text())
    wanted = {name: parts[name] for name in ("scheduler", "unet", "vae", "text_encoder", "tokenizer")}
    pipe = ControlledPipeline(**wanted, base=index["base"], chain=index["chain"])
    pipe.register_to_config(_name_or_path=str(out))
    return pipe


def test_an_export_may_be_loaded_in_half_precision(finished, tmp_path):
    """As text models usually are; what the control does to the pictures is what it does in float32 but for rounding."""
    run, _ = run_on("SD 1", finished, tmp_path)
    export(run, tmp_path / "out")

    def drawn(pipe, **given):
        generator = torch.Generator().manual_seed(0)
        return pipe("two", num_images_per_prompt=4, output_type="pt", generator=generator, **given).images.float()

    full, half = opened(tmp_path / "out"), opened(tmp_path / "out", torch_dtype=torch.bfloat16)
    said, meant = (drawn(pipe, controls={"dark": "yes"}) - drawn(pipe) for pipe in (half, full))
    assert meant.abs().max() > 0.05
    assert torch.cosine_similarity(said.flatten(), meant.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("strength", [1.0, 1.5])
def test_an_exported_control_keeps_to_its_interval(finished, tmp_path, strength):
    """And says so. Outside it the pipeline draws what it draws without the control; inside, what the run samples."""
    run, _ = run_on("SD 1", finished, tmp_path)
    path = run / "control" / "control.json"
    about = json.loads(path.read_text())
    trained = Run.load(run)
    first = trained.policy.schedule(trained.times[0])[1]

    def drawn(interval, *controls):
        path.write_text(json.dumps({**about, "interval": interval}))
        export(run, tmp_path / "out", JobOptions(overwrite=True))
        pipe = opened(tmp_path / "out")
        return [
            pipe(
                "two", num_images_per_prompt=2, output_type="pt", generator=torch.Generator().manual_seed(3),
                controls=labels, control_strength=strength,
            ).images
            for labels in controls
        ]  # fmt: skip

    everywhere, bare = drawn(None, {"dark": "yes"}, None)
    assert "speaks only" not in (tmp_path / "out" / "README.md").read_text()
    (silent,) = drawn([0.001, 0.002], {"dark": "yes"})
    (once,) = drawn([float(first) - 0.001, float(first)], {"dark": "yes"})
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("`dark` speaks only at noise levels σ from ") == 1
    assert f" to {float(first):.3g}: outside," in card
    assert torch.equal(silent, bare)
    assert not torch.equal(once, bare)
    assert not torch.equal(once, everywhere)
    sampled = Run.load(run).sample(
        torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.long), strength,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert torch.equal((sampled + 1) / 2, once)


def test_an_exported_control_that_does_not_see_the_prompt_samples_as_the_run_does(finished, ctrl_here, tmp_path):
    """Three evaluations a step; other programs run one, and are refused."""
    run, _ = run_on("SD 1", finished, tmp_path)
    path = run / "control" / "control.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sees_condition": False}))
    y, c = torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    sampled = Run.load(run).sample(y, c, generator=torch.Generator().manual_seed(3))
    export(run, tmp_path / "out")
    drawn = opened(tmp_path / "out")(
        "two", num_images_per_prompt=2, output_type="pt", generator=torch.Generator().manual_seed(3),
        controls={"dark": "yes"},
    ).images  # fmt: skip
    assert torch.equal((sampled + 1) / 2, drawn)
    done = ctrl_here("export", run, tmp_path / "files", "--for", "diffusers")
    assert (done.returncode, (tmp_path / "files").exists()) == (2, False)
    assert "does not see the prior's condition: it takes three evaluations a step" in done.stderr


def test_an_exported_control_takes_every_gamma_it_was_made_for(finished, tmp_path):
    """The run's own by default, and any other within its range, as the run samples it."""
    run, _ = run_on("SD 1", finished, tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"gamma": 2.0, "gammas": [0.5, 4]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    control = LoRAControl("dark", ("no", "yes"), Prior.from_pretrained(tmp_path / "prior").denoiser, 2, gammas=(0.5, 4))
    with torch.no_grad():
        for i, p in enumerate([control.table.weight, *control.of_gamma.parameters()]):
            p[:-1] += torch.randn(p[:-1].shape, generator=torch.Generator().manual_seed(i))
    control.save(run / "control")
    export(run, tmp_path / "out")
    pipe, y = opened(tmp_path / "out"), torch.ones(2, dtype=torch.long)

    def drawn(gamma=None):
        noise = torch.Generator().manual_seed(3)
        options = {"num_images_per_prompt": 2, "output_type": "pt", "generator": noise, "control_gamma": gamma}
        return pipe("two", controls={"dark": "yes"}, **options).images

    assert torch.equal(drawn(), drawn(2.0))
    assert (drawn() - drawn(0.5)).abs().max() > 1e-3
    for gamma in (None, 0.5, 3.0):
        sampled = Run.load(run).sample(y, y, generator=torch.Generator().manual_seed(3), gamma=gamma)
        assert torch.equal((sampled + 1) / 2, drawn(gamma))
    with pytest.raises(ValueError, match=r"trained for γ = 0\.5 … 4, got 8"):
        drawn(8.0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "control_gamma=" in card
    assert "0.5 to 4" in card


def assert_samples(run, drawn):
    """Images drawn at seed 3 are those of `ctrl sample`, which differ from the prior's."""
    y = torch.ones(2, dtype=torch.long)
    sampled = run.sample(y, y, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, (sampled + 1) / 2, rtol=0, atol=1 / 255)
    null = run.sample(-y, y, generator=torch.Generator().manual_seed(3))
    assert (sampled - null).abs().max() > 0.05


class GaussianFlow(FlowMatchEulerDiscreteScheduler):
    """Stock pipelines of flows with the Gaussian step of ancestral sampling at given times."""

    def prepare(self, times, generator, packed):
        self.grid, self.generator, self.packed = times, generator, packed
        return self

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.sigmas = torch.tensor([*self.grid, 0.0])
        self.timesteps, self._step_index = 1000 * self.sigmas[:-1], 0

    def step(self, model_output, timestep, sample, return_dict=False):
        t, s = self.sigmas[self._step_index : self._step_index + 2].double()
        self._step_index += 1
        x_hat = sample - t.float() * model_output
        if s == 0:
            return (x_hat,)
        std = s / t * (t**2 - ((1 - t) / (1 - s) * s) ** 2).clamp(min=0).sqrt()
        rest = (s**2 - std**2).clamp(min=0).sqrt() / t
        mean = (1 - s - rest * (1 - t)).float() * x_hat + rest.float() * sample
        return (mean + std.float() * self.packed(self.generator),)


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize("name", ["SD 1", pytest.param("SDXL", marks=pytest.mark.slow)])
def test_stock_diffusers_draws_our_images(finished, ctrl_here, tmp_path, name):
    """`load_lora_weights` of a file, DDPM's steps at the run's timesteps, the last of them without the control.

    Within 1/255, the rounding of a PNG, of `ctrl sample` at strength 1.
    """
    run, _ = run_on(name, finished, tmp_path)
    assert ctrl_here("export", run, tmp_path / "out", "--for", "diffusers").returncode == 0
    opened, generator = Run.load(run), torch.Generator().manual_seed(3)
    pipe = getattr(diffusers, opened.prior.pipeline).from_pretrained(tmp_path / "prior")
    pipe.load_lora_weights(tmp_path / "out" / "programs" / "diffusers", weight_name="dark-yes.safetensors")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    timesteps = [round(1000 * t) - 1 for t in opened.times]

    def speak(pipe, step, timestep, tensors):
        if step + 2 == len(timesteps):
            pipe.disable_lora()
        return tensors

    drawn = pipe(
        "two", timesteps=timesteps, num_images_per_prompt=2, generator=generator, output_type="pt",
        callback_on_step_end=speak, guidance_scale=opened.config.guidance,
    ).images  # fmt: skip
    assert_samples(opened, drawn)


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
@pytest.mark.parametrize("name", [pytest.param("Flux"), pytest.param("SD 3", marks=pytest.mark.slow)])
def test_stock_flows_draw_our_images(finished, ctrl_here, tmp_path, name):
    """As the test above; their own scheduler adds no noise, so it is given our step."""
    run, config = run_on(name, finished, tmp_path)
    done = ctrl_here("export", run, tmp_path / "out", "--for", "all")
    assert done.returncode == 0
    assert "not for a1111: " in done.stderr
    opened, generator = Run.load(run), torch.Generator().manual_seed(3)
    lacking = {"text_encoder_3": None, "tokenizer_3": None} if name == "SD 3" else {}
    pipe = getattr(diffusers, opened.prior.pipeline).from_pretrained(tmp_path / "prior", **lacking)
    pipe.load_lora_weights(tmp_path / "out" / "programs" / "diffusers", weight_name="dark-yes.safetensors")
    channels, height, width = opened.policy.shape

    def packed(generator):
        noise = torch.randn(2, channels, height, width, generator=generator)
        return pipe._pack_latents(noise, 2, channels, height, width) if name == "Flux" else noise

    flow = GaussianFlow.from_config(pipe.scheduler.config)
    pipe.scheduler, last = flow.prepare(opened.times, generator, packed), len(opened.times) - 2

    def speak(pipe, step, timestep, tensors):
        if step == last:
            pipe.disable_lora()
        return tensors

    size = dict(zip(("height", "width"), config["size"] or (32, 32), strict=True))
    drawn = pipe(
        "two", num_images_per_prompt=2, num_inference_steps=len(opened.times), generator=generator, output_type="pt",
        callback_on_step_end=speak, guidance_scale=opened.config.guidance, **size,
    ).images  # fmt: skip
    assert_samples(opened, drawn)


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_the_callback_of_the_page_keeps_a_file_to_its_interval(finished, ctrl_here, tmp_path):
    """Stock diffusers with the code that the page prints draws `ctrl sample`'s images; at every step it does not."""
    run, _ = run_on("SD 1", finished, tmp_path)
    about = json.loads((run / "control" / "control.json").read_text())
    opened = Run.load(run)
    sigmas = opened.policy.schedule(torch.tensor(opened.times, dtype=torch.float64))[1].tolist()
    # the second of three steps alone, to its very noise level, whose timestep the page has to six digits
    interval = [sigmas[1], (sigmas[0] + sigmas[1]) / 2]
    (run / "control" / "control.json").write_text(json.dumps({**about, "interval": interval}))
    assert ctrl_here("export", run, tmp_path / "out", "--for", "diffusers").returncode == 0
    page = (tmp_path / "out" / "programs" / "README.md").read_text()
    code = page[page.index("STRENGTHS = {") :]
    names = {}
    exec(code[: code.index("```")], names)
    timesteps = [round(1000 * t) - 1 for t in opened.times]

    def drawn(callback):
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "prior")
        files = tmp_path / "out" / "programs" / "diffusers"
        pipe.load_lora_weights(files, weight_name="dark-yes.safetensors", adapter_name="dark")
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        if callback:
            pipe.scheduler.set_timesteps(timesteps=timesteps)
            callback(pipe, -1, None, {})
        noise = torch.Generator().manual_seed(3)
        options = {"num_images_per_prompt": 2, "output_type": "pt", "guidance_scale": opened.config.guidance}
        return pipe("two", timesteps=timesteps, generator=noise, callback_on_step_end=callback, **options).images

    y = torch.ones(2, dtype=torch.long)
    sampled = (Run.load(run).sample(y, y, generator=torch.Generator().manual_seed(3)) + 1) / 2
    torch.testing.assert_close(drawn(names["keep_to_intervals"]), sampled, rtol=0, atol=1 / 255)
    assert (drawn(None) - sampled).abs().max() > 0.02


def test_files_for_other_programs_lie_beside_the_pipeline(finished, ctrl_here, tmp_path):
    """One for every value, a page that names them, and no LoRA alone that could not obey y."""
    run, _ = run_on("SD 1", finished, tmp_path)
    about = json.loads((run / "control" / "control.json").read_text())
    (run / "control" / "control.json").write_text(json.dumps({**about, "interval": [0.2, 0.9]}))
    done = ctrl_here("export", run, tmp_path / "out", "--for", "comfyui", "--for", "a1111")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "dark speaks on a part of the steps, and A1111 and Forge will apply it on all" in done.stderr
    folder = tmp_path / "out" / "programs"
    assert sorted(p.name for p in folder.rglob("*.safetensors")) == ["dark-no.safetensors", "dark-yes.safetensors"]
    page = (folder / "README.md").read_text()
    assert "{{" not in page
    assert "{%" not in page
    for part in ("## ComfyUI", "## A1111 and Forge", "`dark-yes.safetensors`", "euler_a", "start_percent"):
        assert part in page
    assert "## InvokeAI" not in page
    assert "LoRA files for ComfyUI, A1111 and Forge" in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out" / "controls").rglob("pytorch_lora*"))
    assert ctrl_here("export", run, tmp_path / "out", "--overwrite", "--quiet").returncode == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "programs"), [("DDPM", "all"), ("DiT", "diffusers"), ("Flux", "invokeai"), ("PixArt-Sigma", "all")]
)
def test_programs_that_cannot_take_a_control_are_named(finished, ctrl_here, tmp_path, name, programs):
    run, _ = run_on(name, finished, tmp_path)
    done = ctrl_here("export", run, tmp_path / "out", "--for", programs)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--for " in done.stderr
    assert not (tmp_path / "out").exists()


def test_it_is_pushed_to_the_hub(finished, tmp_path, monkeypatch, ctrl_here):
    """To a hub that is a folder here; where there is none, one line, and the folder stays."""
    hub = tmp_path / "hub"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, exist_ok: (hub / name).mkdir(parents=True))

    def upload(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert ctrl_here("export", finished, tmp_path / "out", "--push", "me/dark", "--quiet").returncode == 0
    files = [sorted(p.relative_to(root) for p in root.rglob("*")) for root in (tmp_path / "out", hub / "me" / "dark")]
    assert files[0] == files[1]
    monkeypatch.undo()
    done = ctrl_here("export", finished, tmp_path / "out", "--push", "me/dark", "--overwrite")
    assert done.returncode == 2
    assert "is written, but the hub does not take it as me/dark" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}", "{out}"], "there is no folder"),
        (["{run}", "{run}"], "exists and is not empty. Choose another --out, or pass --overwrite"),
        (["{run}", "{run}", "--overwrite"], "model_index.json"),
    ],
)
def test_what_cannot_be_exported_is_one_line(finished, ctrl_here, tmp_path, arguments, message):
    names = {"none": tmp_path / "none", "run": finished, "out": tmp_path / "out"}
    done = ctrl_here("export", *(text.format(**names) for text in arguments))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": None}, "this model takes a prompt"),
        ({"class_labels": 3}, "this model takes a prompt"),
        ({"controls": {"bright": "yes"}}, "unknown control 'bright'; this pipeline has: dark"),
        ({"controls": {"dark": "maybe"}}, "dark must be one of no, yes, got 'maybe'"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(finished, tmp_path, given, message):
    run, _ = run_on("SD 1", finished, tmp_path)
    export(run, tmp_path / "out")
    pipe = opened(tmp_path / "out")
    assert pipe("two", controls={"dark": "no"}, output_type="pt").images.shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match=message):
        pipe(**({"prompt": "two"} | given))


def test_the_run_that_ships_is_exported_by_its_name_without_a_picture(ctrl_here, tmp_path):
    done = ctrl_here("export", "ink", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "ink has no grid.png" in done.stdout + done.stderr
    assert "grid.png" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
