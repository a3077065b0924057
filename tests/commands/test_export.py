"""A run leaves as a pipeline that diffusers loads where nothing of ours is installed."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DModel
from huggingface_hub import HfApi
from PIL import Image
from pipelines import BUILDERS, saved
from safetensors.torch import load_file, save_file

from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.commands.jobs.export import export
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.run.pipeline import ControlledPipeline
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.progress import JobOptions
from tests.prior.odd import as_variant, renamed, rewrite, weights_of

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run on a text model."""
    folder = tmp_path_factory.mktemp("export")
    saved("SD 1", folder / "prior")
    dark = torch.arange(60) % 2
    x = torch.where(dark[:, None, None, None] == 1, -0.5, 0.5) + 0.1 * torch.randn(60, 3, 32, 32)
    write_imagefolder(folder / "data", LabelledImages(x, {"dark": dark}, {"dark": ("no", "yes")}))
    given = {
        "prior": str(folder / "prior"), "prompts": ["a seven", "two"], "data": str(folder / "data"), "control": "dark",
        "classifier": {"updates": 60, "grid": 1, "depth": 1, "head": "categorical"}, "learners": ["weighted"],
        "weighted": {"updates": 3, "batch": 4, "cache": 8, "renoising": 2}, "steps": 3, "rank": 2,
        "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job.train_job(given, folder / "run")
    return folder / "run"


def run_on(name, finished, folder):
    """The run as it would be on another family's pipeline, with a control that does something."""
    saved(name, folder / "prior")
    shutil.copytree(finished, folder / "run")
    config = yaml.safe_load((finished / "config.yaml").read_text()) | {"prior": str(folder / "prior")}
    if name in ("DDPM", "DiT"):
        config |= {"prompts": None, "guidance": None, "classes": None if name == "DDPM" else [0, 3]}
    config["size"] = [32, 48] if name == "Flux" else None
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    prior = Prior.from_pretrained(folder / "prior", config["size"])
    LoRAControl("dark", ("no", "yes"), prior.denoiser, rank=2).save(folder / "run" / "control")
    weights, draw = folder / "run" / "control" / "control.safetensors", torch.Generator().manual_seed(0)
    save_file({k: v + 0.3 * torch.randn(v.shape, generator=draw) for k, v in load_file(weights).items()}, weights)
    return folder / "run", config


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("SD 2", "SDXL", "SD 3", "DiT") else ()) for n in BUILDERS]
)
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
    expected = load_file(weights_of(tmp_path / "prior" / "unet"))
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


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_adapter_alone_is_what_diffusers_loads(finished, tmp_path, alpha):
    """`load_lora_weights` of the pipeline the run was trained on gives its layers W + BA, scaled by α over the rank."""
    run, _ = run_on("SD 1", finished, tmp_path)
    about = json.loads((run / "control" / "control.json").read_text())
    (run / "control" / "control.json").write_text(json.dumps({**about, "alpha": alpha}))
    export(run, tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "prior")
    pipeline.load_lora_weights(tmp_path / "out" / "controls" / "dark")
    tensors = load_file(run / "control" / "control.safetensors")
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        layer = pipeline.unet.get_submodule(key.removeprefix("adapter.").removesuffix(".lora_A.weight"))
        expected = (alpha or 2) / 2 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        torch.testing.assert_close(layer.get_delta_weight(layer.active_adapters[0]), expected)


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
