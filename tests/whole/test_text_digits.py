"""A small Stable Diffusion trained for real, text and autoencoder with it, goes through the commands.

Of two digits: names, pictures and labelled images are what they are said to be, and who reads them can read.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import text_digits
import torch
import transformers
import two_digits
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.run.run import Run

if int(transformers.__version__.partition(".")[0]) < 5:
    pytest.skip("transformers 4 makes no tokenizer without files", allow_module_level=True)

EXAMPLE = Path(__file__).parents[2] / "examples" / "text_digits.py"
REDUCED = {
    "guidance": 1.0,
    "rank": 32,
    "steps": 10,
    "classifier": {"head": "ordinal", "grid": 1, "depth": 1, "augment": "any_side_up", "updates": 1500},
    "weighted": {"updates": 150, "batch": 128, "cache": 100, "renoising": 30},
    "learners": ["weighted"],
    "evaluation": {"prior_samples": 100, "paths": 400, "probes": 2, "sweep_paths": 40},
}


NAMED = {
    0: "zero zero", 7: "zero seven", 10: "ten", 12: "twelve", 19: "nineteen", 20: "twenty", 21: "twenty one",
    40: "forty", 42: "forty two", 99: "ninety nine",
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The example of two digits after a handful of updates."""
    folder = tmp_path_factory.mktemp("two")
    arguments = ["text_digits.py", "--digits", "2", "--out", str(folder), "--autoencoder", "2", "--updates", "4"]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", arguments)
        text_digits.main()
    return folder


@pytest.mark.parametrize(("number", "name"), NAMED.items())
def test_numbers_are_named_as_they_are_spoken(number, name):
    assert text_digits.SIZES[2].prompts[number] == f"a handwritten {name}"


@pytest.mark.parametrize("size", text_digits.SIZES.values(), ids=lambda size: size.digits)
def test_every_prompt_has_tokens_of_its_own(size):
    tokenizer, _ = text_digits.text_parts(size.longest)
    tokens = tokenizer(list(size.prompts)).input_ids
    assert len({tuple(row) for row in tokens}) == len(size.prompts) == 10**size.digits
    for prompt, row in zip(size.prompts, tokens, strict=True):
        assert len(row) == len(prompt.replace(" ", "")) + 2 <= size.longest  # a letter each, the start and the end


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_digit_is_left_and_counts_most(count):
    c = torch.arange(2 * count)
    x = c.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    pictures, number = text_digits.side_by_side(x, c, count)
    for picture, value, digits in zip(pictures, number, c.view(2, count), strict=True):
        assert int(value) == int("".join(str(int(k)) for k in digits))
        assert torch.equal(picture[0], digits.float().repeat_interleave(2).expand(2, -1))


def test_every_number_has_five_labelled_images_of_digits_the_pipeline_never_saw(two):
    x, c = text_digits.digits()
    known, others = text_digits.train_test_split(range(len(x)), test_size=500, stratify=c, random_state=0)
    assert not set(known) & set(others)
    places = {((x[i, 0] + 1) * 127.5).round().byte().numpy().tobytes(): int(c[i]) for i in others}
    with (two / "photos" / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file_name", "prompt", "ink"]
    prompts = [row["prompt"] for row in rows]
    assert {prompt: prompts.count(prompt) for prompt in prompts} == dict.fromkeys(text_digits.SIZES[2].prompts, 5)
    means = []
    for row in rows:
        pixels = np.asarray(Image.open(two / "photos" / row["file_name"]))
        tens, units = (places[np.ascontiguousarray(half).tobytes()] for half in np.split(pixels, 2, 1))
        assert text_digits.SIZES[2].prompts[10 * tens + units] == row["prompt"]
        means.append(pixels.mean())
    ranks, ink = np.argsort(np.argsort(means)), np.array([int(row["ink"]) for row in rows])
    # equal means may fall on a border: a quarter is within three of 125
    assert np.abs(ink - 1 - ranks / 125 + 0.5).max() <= 0.5 + 3 / 125


def test_the_prompts_are_listed_in_random_order(two):
    prompts = (two / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(prompts) == sorted(text_digits.SIZES[2].prompts)
    first = [text_digits.SIZES[2].prompts.index(prompt) for prompt in prompts[:70]]
    # 70 of 100 at random leave out about three numbers of each ten, of a row or a column of the table
    for digits in ([n // 10 for n in first], [n % 10 for n in first]):
        assert min(digits.count(k) for k in range(10)) >= 3


def test_the_pipeline_of_two_digits_is_one_of_diffusers_and_a_prior(two):
    pipeline = StableDiffusionPipeline.from_pretrained(two / "pipeline", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a handwritten forty two", num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape[:3] == (1, 16, 32)
    prior = Prior.from_pretrained(two / "pipeline").with_prompts(text_digits.SIZES[2].prompts, 1.0)
    assert prior.denoiser.shape == (4, 8, 16)
    assert prior.classes == 100


def test_the_reader_reads_unseen_digits(two):
    x, wanted = two_digits.labelled(two / "photos")
    figures = two_digits.agreement(two_digits.read_numbers(two_digits.fit_reader(), x), wanted)
    # 0.992 of 500; a fall by three standard errors of such a share, 0.012, would make figures about samples worthless
    assert figures["number"] > 0.98
    assert figures["swapped"] == 0


def test_the_wrong_way_round_is_told_from_wrong():
    wanted = torch.tensor([12, 12, 12, 33])
    figures = two_digits.agreement(torch.tensor([12, 21, 15, 35]), wanted)
    assert figures == {
        "number": 0.25, "left": 0.75, "right": 0.25, "swapped": pytest.approx(1 / 3),
        "worst": {"prompt": "a handwritten thirty three", "number": 0.0},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_a_text_pipeline_learns_ink(ctrl, tmp_path):
    sizes = ("--autoencoder", "150", "--updates", "500")
    subprocess.run([sys.executable, EXAMPLE, "--out", tmp_path, *sizes], check=True, capture_output=True)
    with (tmp_path / "photos" / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [sum(row["ink"] == k for row in rows) for k in "1234"] == [125] * 4
    assert len({row["prompt"] for row in rows}) == 10
    (tmp_path / "reduced.yaml").write_text(yaml.safe_dump(REDUCED))
    about = ("--prior", tmp_path / "pipeline", "--data", tmp_path / "photos", "--control", "ink")
    options = ("--condition", "prompt", "--config", tmp_path / "reduced.yaml", "--out", tmp_path / "run")
    done = ctrl("train", *about, *options, timeout=3600)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["ctrl"]["accuracy"] > metrics["prior"]["accuracy"] + 0.15
    assert metrics["ctrl"]["class_accuracy"] > metrics["prior"]["class_accuracy"] - 0.1
    the_pipelines_own(tmp_path)


def the_pipelines_own(root):
    """With a null label, the prediction of the UNet diffusers loads, given the prompt as its pipeline encodes it."""
    pipeline, opened = (
        StableDiffusionPipeline.from_pretrained(root / "pipeline", safety_checker=None),
        Run.load(root / "run"),
    )
    prompts = opened.prior.class_names[:3]
    text, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, do_classifier_free_guidance=False)
    x_t, null = torch.randn(3, 4, 8, 8), {"ink": torch.full((3,), -1)}
    alpha, sigma = (float(a) for a in opened.policy.schedule(0.401))
    with torch.no_grad():
        v = pipeline.unet.eval()(x_t, torch.full((3,), 400.0), text).sample
        x_hat = opened.policy(x_t, 0.401, labels=null, c=torch.arange(3))
    assert torch.equal(x_hat, alpha * x_t - sigma * v)
