"""Runs that several commands' tests look at; no test may change them."""

import pytest
import torch
from pipelines import saved
from tiny import TINY

from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder


@pytest.fixture(scope="session")
def both(once):
    """A tiny run with two controls from two datasets."""
    settings = {**TINY, "learners": ["weighted", "adjoint"]}
    return once("both", lambda folder: demo_job(settings, folder, controls="ink,slant"))


@pytest.fixture(scope="session")
def finished(once):
    """A tiny run on a text model."""

    def train(root):
        saved("SD 1", root / "prior")
        dark = torch.arange(60) % 2
        x = torch.where(dark[:, None, None, None] == 1, -0.5, 0.5) + 0.1 * torch.randn(60, 3, 32, 32)
        write_imagefolder(root / "data", LabelledImages(x, {"dark": dark}, {"dark": ("no", "yes")}))
        given = {
            "prior": str(root / "prior"), "prompts": ["a seven", "two"], "data": str(root / "data"), "control": "dark",
            "classifier": {"updates": 60, "grid": 1, "depth": 1, "head": "categorical"}, "learners": ["weighted"],
            "weighted": {"updates": 3, "batch": 4, "cache": 8, "renoising": 2}, "steps": 3, "rank": 2,
            "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8},
        }  # fmt: skip
        job.train_job(given, root / "run")

    return once("text", train) / "run"
