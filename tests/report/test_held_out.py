"""The section on conditions that no training saw, in the page of a run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import Drawn

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.evaluate.evaluation import generalises
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS
from ctrl_diffusion.report.classifier import write_classifier_report
from ctrl_diffusion.report.held_out import BINS, HeldOut, gaps_figure
from ctrl_diffusion.report.pictures import PictureSamples
from ctrl_diffusion.report.run import write_report
from ctrl_diffusion.report.style import save_figure, sheet_figure
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.folder import RunFolder, StartRecord
from ctrl_diffusion.run.measure import Measurements
from ctrl_diffusion.run.metrics import RunMetrics
from ctrl_diffusion.run.run import Run

INKS = ["light", "even", "dark", "black"]


def prompts(n, of):
    animals, places = ("dog", "cat", "heron", "hare", "badger"), ("in the snow", "on a beach", "under a tree")
    return [f"a {of} of a {animals[i % 5]} {places[i // 5 % 3]}, number {i}" for i in range(n)]


def held_out(seen=120, unseen=60, members=100, gap=0.4):
    """An evaluation on drawn conditions, and on others that were held out."""
    found = [
        Drawn("gaussian", i, groups, members, gap=each, names={"c": prompts(groups, of), "y": INKS}).evaluation()
        for i, (groups, each, of) in enumerate([(seen, 0.2, "photograph"), (unseen, gap, "drawing")])
    ]
    return replace(found[0], held_out=found[1])


@pytest.fixture(scope="module")
def page(digits_run, tmp_path_factory):
    """Write the page of a run with an evaluation."""
    run, panel, samples = digits_run

    def write(evaluation, worst=None):
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        folder.classifier("ink").mkdir()
        write_classifier_report(folder.classifier("ink"), panel, samples)
        evaluation.slope = None
        record = {"stage": "adjoint", "update": 1, "J": -1.0, "probe_kl": 0.5, "probe_reward": -0.5}
        records = [record, {**record, "update": 2, "stopped": "nothing more to gain"}, {**record, "update": 2}]
        sweep = {
            "strength": {0.0: evaluation.prior, 1.0: evaluation.ctrl},
            "steps": {run.config.steps: evaluation.ctrl},
        }
        measurements = Measurements(evaluation, {}, sweep)
        seconds = {"classifier": 1.0, "train": 2.0, "sample": 3.0}
        metrics = RunMetrics.from_run(run, measurements, records, StartRecord("ctrl train", seconds, {}, {}, {}))
        grid = torch.linspace(-1, 1, 40 * 64).view(40, 1, 8, 8)
        write_report(folder, run, metrics, measurements, PictureSamples(grid, grid, None, worst), records, "ctrl train")
        return folder, metrics.as_dict()

    return write


@pytest.fixture(scope="module")
def digits_run():
    """An untrained run on ink, with its p̂ fitted for a moment."""
    settings = ClassifierSettings(head="ordinal", grid=1, depth=1, updates=150)
    panel, samples = fit_panel(labelled_digits("ink", 0)[0][0], "ink", ruler=True, settings=settings)
    config = {"prior": "digits", "controls": [{"name": "ink", "data": "-", "ruler": "ink"}], "rank": 2, "steps": 8}
    run = Run.start(Config.from_values(config), Prior.from_pretrained(DIGITS), {"ink": panel})
    return run, panel, samples


def test_the_page_has_both_certificates_the_histogram_and_the_worst(page, tmp_path):
    evaluation = held_out()
    worst = HeldOut.from_evaluation(evaluation, RunFolder(tmp_path)).worst
    names = [row["name"] for row in worst]
    assert len(names) == 10
    save_figure(tmp_path / "one.png", sheet_figure(torch.zeros(4, 1, 8, 8)))
    grids = {name: torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8) for name in names[:9]}
    folder, metrics = page(evaluation, {**grids, names[9]: tmp_path / "one.png"})
    text = folder.report.read_text()
    assert "Conditions it never saw" in text
    assert generalises(evaluation)[1:] in text
    assert all(text.count(name) == 3 for name in names), "in the table, and with their samples"
    assert folder.picture("gaps").is_file()
    assert len(list(folder.path.glob("worst-*.png"))) == 9, "one is a file already"
    certificates = metrics["certificate"], metrics["held_out"]["certificate"]
    for certificate in certificates:
        assert f"{certificate['gap_nats']:.3f} ± {certificate['gap_stderr']:.3f}" in text
        assert f"{certificate['certified_pairs']} of {certificate['of_pairs']}" in text
    assert set(metrics["held_out"]) == {"prior", "target", "ctrl", "certificate"}
    assert len(metrics["held_out"]["certificate"]["conditions"]) == 60
    folder.clear_results()
    assert not list(folder.path.glob("*.png"))


def test_without_held_out_conditions_the_page_does_not_speak_of_them(page):
    evaluation = replace(held_out(12, 12), held_out=None)
    folder, metrics = page(evaluation)
    assert "never saw" not in folder.report.read_text()
    assert "held_out" not in metrics
    assert not folder.picture("gaps").exists()


def test_conditions_without_a_certificate_are_counted(page):
    evaluation = held_out(12, 12)
    toy = Drawn("gaussian", 1, 12)
    toy.table[:] = -14.0
    nothing = replace(evaluation, held_out=toy.evaluation())
    folder, metrics = page(nothing)
    text = " ".join(folder.report.read_text().split())
    assert "Gap on c it never saw: not certified, on those it was trained on 0." in text
    assert "Of 0 of the c it was trained on and of 12 of those it never saw no (c, y) is certified" in text
    assert not folder.picture("gaps").exists()
    assert metrics["held_out"]["certificate"]["gap_nats"] is None


def test_the_histogram_counts_every_condition():
    """The shares of either sum to one, a condition far off included."""
    evaluation = held_out(12, 40)
    evaluation.held_out.certificate.breakdown.gap[0] = 50.0
    axes = gaps_figure(evaluation).axes[0]
    width = (axes.get_xlim()[1] - axes.get_xlim()[0]) / BINS
    for polygon in axes.patches:
        x, y = polygon.get_xy().T
        area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        assert area / width == pytest.approx(1.0, abs=1e-6)
