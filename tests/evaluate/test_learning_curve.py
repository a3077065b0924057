"""More labels: what a power law says beyond them, with what error, and where it says nothing."""

import json

import numpy as np
import pytest
import torch

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.commands.jobs.train import classifier_job
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.evaluate.learning_curve import (
    LearningCurve,
    PowerLaw,
    drawn,
    fit_series,
    target_of,
)
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.system.progress import JobOptions

N = np.array([40.0, 80, 160, 320, 640])
BEYOND = np.array([1280.0, 2560])


@pytest.mark.parametrize("law", [PowerLaw(0.1, 4.0, 0.7), PowerLaw(0.0, 2.0, 0.5), PowerLaw(0.4, 30.0, 1.5)])
def test_a_power_law_without_noise_is_found(law):
    """But for the grid of powers: 60 over a factor of 80, then 60 between two neighbours, differ by 0.25 %."""
    found = PowerLaw.fit(N, law(N), np.full(5, 0.01))
    assert found.c == pytest.approx(law.c, rel=0.0025)
    assert found(BEYOND) == pytest.approx(law(BEYOND), abs=0.0025 * (law(N[0]) - law(N[-1])))


def test_bounds_hold():
    """A loss that would end below none ends at none, and one that rises is flat."""
    steep = PowerLaw.fit(N, 1 - 0.15 * np.log(N / 40), np.full(5, 0.01))
    assert steep.a == 0
    rising = PowerLaw.fit(N, 0.1 * np.log(N), np.full(5, 0.01))
    assert rising.b == 0
    assert rising.a == pytest.approx(float(np.mean(0.1 * np.log(N))))


def draws_of(law, noise, rng, draws=4):
    """Values of several draws at each size, around a law."""
    return [law(n) + noise * rng.standard_normal(draws) for n in N]


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """90 % of 200; errors known from four draws, and a bound that cuts, leave less: 75 % is asked for."""
    law, rng = PowerLaw(0.1, 4.0, 0.7), np.random.default_rng(0)
    held = 0
    for _ in range(200):
        series = fit_series("nll", N, draws_of(law, 0.01, rng), BEYOND)
        _, low, high = series.beyond[0]
        held += low <= law(BEYOND[0]) <= high
    assert held >= 150


def test_of_a_share_the_figure_is_extrapolated_not_its_loss():
    law = PowerLaw(0.05, 4.0, 0.7)
    values = [1 - each for each in draws_of(law, 0.002, np.random.default_rng(0))]
    series = fit_series("accuracy", N, values, BEYOND)
    assert series.doubt is None
    assert series.mean == pytest.approx(list(1 - law(N)), abs=0.005)
    for n, (expected, low, high) in zip(BEYOND, series.beyond, strict=True):
        assert low <= expected <= high
        assert expected == pytest.approx(1 - law(n), abs=0.01)


def steps(n):
    return np.where(n < 200, 1.0, 0.2)


@pytest.mark.parametrize(
    ("law", "noise", "said"),
    [
        (lambda n: 0.5 + 0 * n, 0.02, "does not get better by two standard errors"),
        (lambda n: 0.1 * np.log(n), 0.01, "does not get better by two standard errors"),
        (steps, 0.005, "do not lie on a power law"),
        (lambda n: 1 - 0.5 * (n > 600), 0.002, "do not lie on a power law"),
        (PowerLaw(0.1, 4.0, 0.7), 0.01, None),
    ],
)
def test_where_the_fit_means_nothing_that_is_said(law, noise, said):
    series = fit_series("nll", N, draws_of(law, noise, np.random.default_rng(0)), BEYOND)
    assert (series.doubt is None) if said is None else (said in series.doubt)


def test_an_interval_wider_than_the_gain_is_no_extrapolation():
    """A gain of three standard errors, all at the end: the law may go on as steeply, or stop."""
    doubts = {fit_series("nll", N, draws_of(lambda n: 1 - 2e-4 * n, 0.07, np.random.default_rng(s)), BEYOND).doubt
              for s in range(40)}  # fmt: skip
    assert any(doubt and "wider than all that was gained" in doubt for doubt in doubts)


def test_three_sizes_are_too_few():
    rows = [{"labels": n, "nll": 1 / n, "accuracy": 0.5, "target": 0.5} for n in (10, 20, 40) for _ in range(3)]
    curve = LearningCurve.from_draws(rows, 50)
    assert {series.doubt for series in curve.series.values()} == {"3 sizes are too few for a law of three numbers"}
    assert curve.in_words().count("no extrapolation: 3 sizes") == 3


def test_the_target_is_the_accuracy_of_images_weighted_by_p_hat():
    y = torch.tensor([0, 0, 1, 1])
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    by_hand = [(0.9 + 0.6) / 2.0, (0.7 + 0.8) / 2.0]
    assert target_of(p.log(), y) == pytest.approx(sum(by_hand) / 2)
    assert target_of(torch.eye(2)[y].clamp(min=1e-9).log(), y) == pytest.approx(1.0)
    assert target_of(torch.full((4, 2), 0.5).log(), y) == pytest.approx(0.5), "chance"


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_draws_are_disjoint_parts_of_every_stratum(share):
    strata = torch.tensor([0] * 60 + [1] * 40)
    fitting, calibration = drawn(strata, share, 0.2, torch.Generator().manual_seed(0))
    assert not set(fitting.tolist()) & set(calibration.tolist())
    for stratum, size in ((0, 60), (1, 40)):
        counts = [int((strata[rows] == stratum).sum()) for rows in (fitting, calibration)]
        assert sum(counts) == round(share * size)
        assert counts[1] == max(1, round(0.2 * sum(counts)))


@pytest.mark.filterwarnings("ignore")
def test_digits_need_as_many_labels_as_the_report_says(tmp_path):
    """A whole `ctrl classifier --curve`, short fits: the figures get better with labels, and are in file and page."""
    write_imagefolder(tmp_path / "data", labelled_digits("digit", 0, 300)[0][0])
    classifier = {"updates": 60, "grid": 4, "depth": 1, "head": "categorical"}
    config = Config.from_values(
        {"prior": "-", "control": "digit", "data": str(tmp_path / "data"), "classifier": classifier}
    )
    said = []
    panel = classifier_job(config.controls[0], tmp_path / "out", options=JobOptions(say=said.append), curve=True)
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())
    # 300 labels, 15 % held out; a digit has about 15 for p̂, a tenth and 18 % of which are fewer than four
    assert curve["labels"] == [96, 168, 300]
    assert curve["held_out"] == 45
    assert len(curve["draws"]) == 3 * 4
    nll = curve["series"]["nll"]
    assert nll["mean"][0] > nll["mean"][-1] + 2 * max(nll["error"])
    assert abs(nll["mean"][-1] - panel.quality.nll) < 0.5, "about the p̂ that was kept"
    assert any(line.startswith("--curve: at 10%, 18% of the labels a class has fewer than 4") for line in said)
    assert "no extrapolation: 3 sizes are too few" in said[-1]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "How many labels" in page
    assert (tmp_path / "out" / "curve.png").is_file()
    assert panel.classifier.temperature > 0
