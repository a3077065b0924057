"""A small Stable Diffusion trained for real, text and autoencoder with it, goes through the commands."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from ctrl_diffusion.run.run import Run

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
