"""A pipeline trained with diffusers alone and 300 labelled images go through the commands untouched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline

from ctrl_diffusion.run.run import Run

EXAMPLE = Path(__file__).parents[2] / "examples" / "textures.py"
FAST = {
    "classifier": {"updates": 300, "grid": 4, "depth": 2},
    "weighted": {"updates": 5, "batch": 16, "cache": 32, "renoising": 2},
    "adjoint": {"updates": 5, "batch": 8},
    "evaluation": {"prior_samples": 60, "paths": 30, "probes": 1, "sweep_paths": 6},
    "steps": 5,
    "rank": 2,
}


def example(folder, *options):
    subprocess.run([sys.executable, EXAMPLE, "--out", folder, *map(str, options)], check=True, capture_output=True)
    return folder


def the_pipelines_own(root, run):
    """Null labels, and strength 0, give the prediction of the network diffusers loads, bit for bit."""
    network = DDPMPipeline.from_pretrained(root / "pipeline").unet.eval()
    opened, x_t = Run.load(run), torch.randn(4, 3, 16, 12)
    policy, y = opened.policy, torch.tensor([0, 1, 2, 1])
    alpha, sigma = (float(a) for a in policy.schedule(0.401))
    with torch.no_grad():
        # v-prediction, as diffusers' own scheduler turns it into x_0
        expected = alpha * x_t - sigma * network(x_t, torch.full((4,), 400.0)).sample
        assert torch.equal(policy(x_t, 0.401, labels={"texture": torch.full((4,), -1)}), expected)
        assert torch.equal(policy(x_t, 0.401, labels={"texture": y}, strength=0.0), expected)
        assert torch.equal(policy(x_t, 0.401), expected)
        assert not torch.equal(policy(x_t, 0.401, labels={"texture": y}), expected)


def through_the_commands(ctrl, root, *options, timeout=600):
    """classifier, train, sample, evaluate; returns the metrics of the run in root/run."""
    own = ("--control", "texture", "--prior", root / "pipeline")
    commands = [
        ("classifier", root / "photos", *own, "--out", root / "classifier"),
        (
            "train",
            "--data",
            root / "photos",
            *own,
            "--classifier",
            root / "classifier",
            "--out",
            root / "run",
            *options,
        ),
        ("sample", root / "run", "--set", "texture=checks", "-n", 3, "--out", root / "checks"),
        ("evaluate", root / "run", "-n", 30, "--out", root / "figures.json"),
    ]
    for command in commands:
        done = ctrl(*command, timeout=timeout)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    return json.loads((root / "run" / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_a_strangers_pipeline_goes_through_untouched(ctrl, tmp_path):
    root = example(tmp_path, "--updates", 20, "--width", 8)
    (root / "fast.yaml").write_text(yaml.safe_dump(FAST))
    metrics = through_the_commands(ctrl, root, "--config", root / "fast.yaml")
    assert metrics["accuracy_by"] == "judge"
    assert metrics["ctrl"]["class_accuracy"] is None
    assert len(metrics["certificate"]["pairs"]["gap_nats"]) == 3
    assert json.loads((root / "figures.json").read_text())["ctrl"]["samples"] == 30
    table = (root / "checks" / "metadata.csv").read_text().splitlines()
    assert table == ["file_name,texture", *(f"0000{i}.png,checks" for i in range(3))]
    page = (root / "run" / "report.html").read_text()
    assert "according to a judge" in page
    config = yaml.safe_load((root / "run" / "config.yaml").read_text())
    (control,) = config["controls"]
    assert (config["classes"], control["condition"], control["ruler"]) == (None, None, None)
    the_pipelines_own(root, root / "run")
    # an unconditional prior has no class to ask for
    done = ctrl("sample", root / "run", "--class", "3", "--out", root / "no")
    assert (done.returncode, done.stderr) == (2, "ctrl: --class 3: this prior is unconditional. Leave --class out.\n")


@pytest.mark.slow
def test_a_strangers_pipeline_learns_the_control(ctrl, tmp_path):
    """The bar of the project: within 0.07 of what a perfect learner would score, by default settings."""
    root = example(tmp_path)
    metrics = through_the_commands(ctrl, root, timeout=3600)
    assert metrics["target"]["accuracy"] > 0.9
    assert metrics["ctrl"]["accuracy"] >= metrics["target"]["accuracy"] - 0.07
    the_pipelines_own(root, root / "run")
