"""Samples of a run: their files, their seed, exact ones, and those that leave the labelled region."""

import csv
import json
import warnings

import pytest
import torch

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.commands.jobs.sample import outside_share
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.read import read_images
from ctrl_diffusion.run.run import Run


def test_sample_writes_labelled_pictures(ctrl_here, quick_run, tmp_path):
    done = ctrl_here(
        "sample",
        quick_run,
        "--set",
        "ink=3",
        "--class",
        7,
        "-n",
        5,
        "--steps",
        8,
        "--strength",
        1.5,
        "--out",
        tmp_path / "a",
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "a" / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["digit"], row["ink"]) for row in rows] == [("7", "3")] * 5
    assert len(list((tmp_path / "a").glob("0*.png"))) == 5
    assert (tmp_path / "a" / "grid.png").is_file()


def test_sample_seed_strength_and_null(ctrl_here, quick_run, tmp_path):
    options = {
        "prior": [],
        "strength-0": ["--set", "ink=1", "--strength", "0"],
        "again": [],
        "other-seed": ["--seed", "1"],
        "light": ["--set", "ink=1"],
    }
    pictures = {}
    for name, arguments in options.items():
        done = ctrl_here("sample", quick_run, "-n", 3, "--quiet", "--out", tmp_path / name, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pictures[name] = [(tmp_path / name / f"0000{i}.png").read_bytes() for i in range(3)]
    assert pictures["prior"] == pictures["again"] == pictures["strength-0"]
    assert pictures["prior"] != pictures["other-seed"]
    assert pictures["prior"] != pictures["light"]


def test_exact_samples_are_drawn_by_weight(ctrl_here, quick_run, tmp_path):
    """Strength 0 draws them from the prior alone, of which a third has this ink: no smoke test's control is needed."""
    asked = ["sample", quick_run, "--set", "ink=2", "--class", 7, "-n", 8, "--strength", 0, "--steps", 8]
    for name, more in (("exact", ["--exact"]), ("again", ["--exact"]), ("plain", [])):
        done = ctrl_here(*asked, *more, "--quiet", "--out", tmp_path / name)
        assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "exact" / "sample.json").read_text())["exact"] is True
    shape = (1, 8, 8)
    ink = {
        name: rulers.ink_ruler(read_images(tmp_path / name, {"digit": None}, shape).x) for name in ("exact", "plain")
    }
    assert (ink["exact"] == 1).sum() >= 6, "p̂ and the ruler disagree at the borders only"
    assert (ink["plain"] == 1).sum() < 6
    assert (tmp_path / "exact" / "00003.png").read_bytes() == (tmp_path / "again" / "00003.png").read_bytes()


def test_exact_samples_are_weighed_in_full_precision(quick_run):
    """The weight of a path in bfloat16 is of its rounding."""
    run, y, c = Run.load(quick_run), torch.tensor([1]), torch.tensor([7])
    full, half = (
        run.sample(y, c, steps=5, exact=True, generator=torch.Generator().manual_seed(0))
        for run.policy.base.precision in (None, torch.bfloat16)
    )
    assert torch.equal(full, half)


def test_samples_that_leave_the_labelled_region_are_told(quick_run, tmp_path, ctrl_here):
    """Real digits are within, noise is not; what `ctrl sample` draws is counted."""
    run = Run.load(quick_run)
    real = labelled_digits("ink", 0)[0][1].x[:200]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        within = outside_share(run, real, real)
    # conformal on 150 calibration and held-out images: 5 % ± 2 %, and three standard errors of 200
    assert within < 0.05 + 2 * 0.02 + 3 * 0.015
    noise = torch.randn(200, 1, 8, 8)
    assert run.prior_outside == json.loads((quick_run / "metrics.json").read_text())["prior"]["outside_support"]
    with pytest.warns(RuntimeWarning, match=r"\d+% of the samples lie outside the region .* of the prior's \d+%"):
        assert outside_share(run, noise, noise) > 0.5
    asked = ["sample", quick_run, "--set", "ink=2", "-n", 20, "--quiet", "--out", tmp_path / "drawn"]
    assert ctrl_here(*asked).returncode == 0
    drawn = run.sample(
        torch.full((20,), 1), torch.arange(20) % 10, generator=torch.Generator().manual_seed(0), latents=True
    )  # fmt: skip
    told = json.loads((tmp_path / "drawn" / "sample.json").read_text())["outside_support"]
    assert told == pytest.approx(outside_share(run, drawn, drawn))
