"""Models that are given text: prompts, guidance, and a whole job on them."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.run.run import Run
from tests.prior.priors import PROMPTS, assert_close, condition_of, opened


def test_prompts_are_numbered_and_guided(folders):
    """f(∅) + g (f(c) − f(∅)); a new prompt is numbered after the others and changes none of them."""
    one, guided = (opened(folders, "SD 1", guidance=g) for g in (1.0, 3.0))
    empty = Prior.from_pretrained(folders["SD 1"][0]).with_prompts([""], guidance=1.0)
    x, t = torch.randn(2, 4, 8, 8), 0.5
    with torch.no_grad():
        f, f_null = one.denoiser(x, t, **condition_of(one)), empty.denoiser(x, t, c=torch.zeros(2, dtype=torch.long))
        assert_close(guided.denoiser(x, t, **condition_of(one)), f_null + 3 * (f - f_null))
        assert guided.number_of("a nine") == 2
        assert guided.number_of("two") == 1
        assert guided.class_names == ("a seven", "two", "a nine")
        assert_close(guided.denoiser(x, t, **condition_of(one)), f_null + 3 * (f - f_null))
        nine = guided.denoiser(x, t, c=torch.tensor([2, 2]))
        assert (nine - guided.denoiser(x, t, **condition_of(one))).flatten(1).abs().amax(1).min() > 1e-3
    with pytest.raises(ValueError, match="distinct"):
        one.with_prompts(["two", "two"])
    with pytest.raises(ValueError, match="is given no text"):
        Prior.from_pretrained(folders["DiT"][0]).with_prompts(["two"])


def test_what_sdxl_takes_for_no_text_is_zeros_unless_its_index_says_otherwise(folders, tmp_path):
    """A flag that is left out has the default of diffusers."""
    nulls = []
    for i, flag in enumerate([None, True, False]):
        folder = tmp_path / str(i)
        shutil.copytree(folders["SDXL"][0], folder)
        index = json.loads((folder / "model_index.json").read_text())
        index.pop("force_zeros_for_empty_prompt")
        index |= {} if flag is None else {"force_zeros_for_empty_prompt": flag}
        (folder / "model_index.json").write_text(json.dumps(index))
        nulls.append(Prior.from_pretrained(folder).text.encode(["two"], "")[1]["encoder_hidden_states"])
    assert [bool(null.any()) for null in nulls] == [False, False, True]


def test_guidance_without_text_is_refused(folders, tmp_path, ctrl_here):
    (tmp_path / "settings.yaml").write_text("guidance: 4.0")
    done = ctrl_here(
        "train", "--prior", folders["DiT"][0], "--data", tmp_path, "--control", "dark", "--config",
        tmp_path / "settings.yaml", "--out", tmp_path / "run",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "ctrl: guidance and negative_prompt: this prior is given no text. Leave them out.\n"
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:log Z")
@pytest.mark.parametrize("source", ["file", "column"])
def test_a_text_model_goes_through_the_whole_job(folders, ctrl_here, tmp_path, source):
    """Prompts of a file, p̂ and pictures on images; or those of the data, p̂ on latents, and each update in parts; then a
    prompt nobody trained."""
    dark = torch.arange(60) % 2
    x = torch.where(dark[:, None, None, None] == 1, -0.5, 0.5) + 0.1 * torch.randn(60, 3, 32, 32)
    labels = {"prompt": torch.arange(60) // 30, "dark": dark}
    write_imagefolder(tmp_path / "data", LabelledImages(x, labels, {"prompt": tuple(PROMPTS), "dark": ("no", "yes")}))
    (tmp_path / "prompts.txt").write_text("a seven\n\ntwo\n")
    tiny = {
        "classifier": {"updates": 60, "grid": 1, "depth": 1, "head": "categorical", "latents": source == "column"},
        "micro_batch": 3 if source == "column" else None, "lora_alpha": 4.0, "lora_targets": ["to_q", "to_k"],
        "contrast": {"updates": 2, "batch": 4, "cache": 8}, "adjoint": {"updates": 2, "batch": 4},
        "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8}, "steps": 3, "rank": 2,
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    run = tmp_path / "run"
    prompts = ["--prompts", tmp_path / "prompts.txt"] if source == "file" else ["--condition", "prompt"]
    done = ctrl_here(
        "train", "--prior", folders["SD 1"][0], *prompts, "--data", tmp_path / "data", "--control", "dark", "--config",
        tmp_path / "tiny.yaml", "--quiet", "--out", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["prompts"], config["classes"], config["guidance"]) == (PROMPTS, [0, 1], 7.5)
    opened = Run.load(run)
    assert opened.policy.controls["dark"].targets == ["to_q", "to_k"]
    shape = (4, 8, 8) if source == "column" else (3, 32, 32)
    p_hat, judge = opened.panels["dark"].classifier, opened.panels["dark"].judge
    assert (p_hat.latent, p_hat.shape["channels"], judge.shape["channels"]) == (source == "column", shape[0], 3)
    z = torch.randn(2, 4, 8, 8)
    seen = z if source == "column" else opened.prior.decode(z)
    y = torch.tensor([0, 1])
    expected = p_hat.log_prob(seen).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(opened.reward(z, {"dark": y}), expected)
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["ctrl"]["class_accuracy"] is None) == (source == "file")
    assert Image.open(next((run / "samples").glob("0*.png"))).size == (32, 32)
    command = ["sample", run, "--set", "dark=yes", "--class", "a nine", "-n", 2, "--quiet", "--out", tmp_path / "nine"]
    assert ctrl_here(*command).returncode == 0
    column = "c" if source == "file" else "prompt"
    assert (tmp_path / "nine" / "metadata.csv").read_text().splitlines()[:2] == [
        f"file_name,{column},dark",
        "00000.png,a nine,yes",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "this prior is given text. Name the prompts to train on: --prompts FILE, or the column with --condition"),
        (["--prompts", "{latin}"], "latin.txt is no file of prompts, one a line: line 2 is not UTF-8"),
        (["--prompts", "{none}"], "is no file of prompts, one a line"),
        (["--prompts", "{empty}"], "has no prompts. Write one a line"),
        (["--condition", "caption"], "has no column caption; it has: file_name, dark"),
        (["--condition", "dark"], "--condition and --control both name the column 'dark'"),
    ],
)
def test_prompts_that_are_not_there_are_one_line(folders, ctrl_here, tmp_path, arguments, message):
    write_imagefolder(
        tmp_path / "data", LabelledImages(torch.zeros(2, 3, 8, 8), {"dark": torch.arange(2)}, {"dark": ("no", "yes")})
    )
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("a cat\na caf\u00e9\n".encode("latin-1"))
    names = {name: tmp_path / f"{name}.txt" for name in ("none", "empty", "latin")}
    done = ctrl_here(
        "train", "--prior", folders["SD 1"][0], "--data", tmp_path / "data", "--control", "dark",
        *(text.format(**names) for text in arguments), "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
