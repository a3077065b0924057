"""The paper's two experiments as they are shipped, on a tiny pipeline with random weights and the sizes scaled down."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pipelines import saved
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ctrl_diffusion.data.rules import jpeg_kilobytes, load_rule
from ctrl_diffusion.run.config import Config, merged, read_settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "stable_diffusion"
SHIPPED = sorted(path.name for path in EXAMPLE.glob("*.yaml"))
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")
# everything else is as shipped: the prompts, the guidance, the grid, the rank, the learner and its rates
TINY = {
    "prior": "pipeline", "size": [8, 8], "steps": 3, "classes": [0, 44], "backprop": {"updates": 2, "batch": 6},
    "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8},
}  # fmt: skip
FITTED = {"updates": 300, "depth": 1, "augment": "none"}
TINY_RULES = """
import functools
import scores
from ctrl_diffusion.data.rules import jpeg_size
four = functools.partial(jpeg_size, cuts={quartiles})
size = functools.partial(jpeg_size, cuts=({median},))
aesthetic = functools.partial(scores.at_least, score=scores.Aesthetic("clip", "head"), cut={score})
"""


def tiny_clip(folder):
    """A CLIP with random weights and a head laid out as the hub's: linear layers, numbered around dropouts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        clip = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, image_size=16, patch_size=4, projection_dim=12)
        ).eval()
        drop = nn.Dropout(0.2)
        head = nn.Sequential(nn.Linear(12, 16), drop, nn.Linear(16, 8), drop, nn.Linear(8, 4), drop, nn.Linear(4, 1))
    clip.save_pretrained(folder / "clip")
    (folder / "head").mkdir()
    save_file({f"layers.{name}": value for name, value in head.state_dict().items()}, folder / "head/model.safetensors")
    return clip, head.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A copy of the example, the tiny networks, and what make_images.py draws with them."""
    folder = tmp_path_factory.mktemp("example") / "stable_diffusion"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("images", "runs", "__pycache__"))
    saved("SD 1", folder / "pipeline")
    tiny_clip(folder)
    asked = "-n 1600 --prior pipeline --out images --size 8 --steps 3 --batch 100"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["make_images.py", *asked.split()])
        runpy.run_path("make_images.py", run_name="__main__")
        write_rules()
    return folder


def write_rules():
    """Rules of the tiny images, cut where their classes are equally many."""
    images = [Image.open(path) for path in sorted(Path("images").glob("*.png"))]
    kilobytes = [jpeg_kilobytes(image) for image in images]
    score = runpy.run_path("scores.py")["Aesthetic"]("clip", "head")
    text = TINY_RULES.format(
        quartiles=np.quantile(kilobytes, (0.25, 0.5, 0.75)).tolist(), median=float(np.median(kilobytes)),
        score=float(np.median([score(image) for image in images[:200]])),
    )  # fmt: skip
    Path("tiny_rules.py").write_text(text, encoding="utf-8")


@pytest.fixture
def here(made, monkeypatch):
    """In the example's folder, as its README says; its modules are forgotten afterwards."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield made
    for name in ("scores", "tiny_rules"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_a_whole_one(name, monkeypatch):
    """No wrong key, and the rules, prompts and thresholds are those of the paper."""
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = read_settings(EXAMPLE / name)
    prompts = Path(settings.pop("prompts")).read_text(encoding="utf-8").splitlines()
    config = Config.from_values(settings)
    assert (config.steps, config.size, config.gamma) == (50, (512, 512), 1.0)
    assert len(set(prompts)) == len(prompts) == 45
    rules = {control.name: load_rule(control.column) for control in config.controls}
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    images = [Image.fromarray(noise[:side, :side]) for side in (120, 190, 240, 290, 400)]
    kilobytes = [jpeg_kilobytes(image) for image in images]
    cuts = (60, 85, 110) if name == "compressibility.yaml" else (70,)
    assert [rules["size"](image) for image in images] == [sum(kb <= cut for cut in cuts) for kb in kilobytes]
    if "aesthetic" in rules:
        assert rules["aesthetic"].keywords["cut"] == 5.7
    sys.modules.pop("scores", None)


def test_the_images_are_the_priors_own(made, monkeypatch, capsys):
    rows = (made / "images" / "metadata.csv").read_text(encoding="utf-8").splitlines()
    assert rows[:2] == ["file_name,prompt", "00000.png,a cat"]
    assert rows[46] == "00045.png,a cat"
    assert len(rows) == 1601
    assert Image.open(made / "images" / "01599.png").size == (8, 8)
    monkeypatch.setattr(sys, "argv", ["make_images.py", "--out", str(made / "images")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(made / "make_images.py"), run_name="__main__")
    assert "holds images already. Name another folder with --out" in capsys.readouterr().err


def test_an_aesthetic_score_is_the_heads_of_a_normalised_embedding(tmp_path, here, monkeypatch):
    clip, head = tiny_clip(tmp_path)
    scores = runpy.run_path("scores.py")
    image = Image.open("images/00000.png")
    pixels = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    x = torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    with torch.no_grad():
        embedding = clip(pixel_values=x).image_embeds
        expected = float(head(embedding / embedding.norm()))
    assert scores["Aesthetic"](str(tmp_path / "clip"), str(tmp_path / "head"))(image) == pytest.approx(expected, 1e-4)
    # of the hub, one file of the head is asked for, of a revision that cannot change
    asked = []
    monkeypatch.setitem(
        scores["Aesthetic"].load.__globals__, "hf_hub_download",
        lambda *args, **options: asked.append((*args, options)) or tmp_path / "head" / "model.safetensors",
    )  # fmt: skip
    assert scores["Aesthetic"](str(tmp_path / "clip"))(image) == pytest.approx(expected, 1e-4)
    assert asked == [("ttj/sac-logos-ava1-l14-linearMSE", "model.safetensors", {"revision": scores["REVISION"]})]


def test_weights_are_never_unpickled(tmp_path, here):
    clip, head = tiny_clip(tmp_path)
    scores = runpy.run_path("scores.py")
    save_file({"w": torch.zeros(1)}, tmp_path / "head" / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no layers.N.weight; it has: w"):
        scores["Aesthetic"](str(tmp_path / "clip"), str(tmp_path / "head")).load()
    save_file({f"layers.{k}": v for k, v in head.state_dict().items()}, tmp_path / "head" / "model.safetensors")
    torch.save(clip.state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        scores["Aesthetic"](str(tmp_path / "clip"), str(tmp_path / "head")).load()


def scaled_down(name):
    """A shipped config over whose keys tiny sizes, rules and networks are laid."""
    settings = merged(yaml.safe_load(Path(name).read_text(encoding="utf-8")), TINY)
    if "control" in settings:
        return merged(settings, {"control": "size:tiny_rules:four", "classifier": {**FITTED, "head": "ordinal"}})
    laid = [
        {"name": "size:tiny_rules:size", "classifier": FITTED},
        {"name": "aesthetic:tiny_rules:aesthetic", "classifier": {"updates": 100, "backbone": "clip"}},
    ]
    return settings | {"controls": [merged(*pair) for pair in zip(settings["controls"], laid, strict=True)]}


@pytest.mark.filterwarnings("ignore:log Z")
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_runs(here, ctrl_here, tmp_path, capsys, name):
    Path("tiny.yaml").write_text(yaml.safe_dump(scaled_down(name)), encoding="utf-8")
    done = ctrl_here("train", "--config", "tiny.yaml", "--out", tmp_path / "run", "--quiet", "--trust")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert [record["stage"] for record in metrics["training"]["stages"]] == ["backprop"]
    run = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert (run["rank"], run["guidance"], run["time_power"], len(run["prompts"])) == (4, 7.5, 1.0, 45)
    assert (tmp_path / "run" / "report.html").is_file()
    # an animal nobody trained, and the README's way to measure what came
    asked = ("--set", "size=1", "--class", "a snail", "-n", 3)
    assert ctrl_here("sample", tmp_path / "run", *asked, "--out", "small", "--overwrite").returncode == 0
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert capsys.readouterr().out == "Counter({3: 3})\n"  # every image of 8 × 8 pixels is below 60 kB


def test_the_readme_names_what_is_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (EXAMPLE / link).exists(), link
    commands = re.findall(r"^(?:python|ctrl train --config) (\S+)", README, re.M)
    assert sorted(set(commands)) == sorted({*SHIPPED, "make_images.py"})
