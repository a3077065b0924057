from dataclasses import replace

import pytest
import torch

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.exact.races import Picture
from ctrl_diffusion.exact.task import GROWING
from ctrl_diffusion.report.classifier import write_classifier_report
from ctrl_diffusion.report.run import sweep_figure
from ctrl_diffusion.report.style import distinct_endings, stacked
from ctrl_diffusion.report.testbed import write_exact_report
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel
from ctrl_diffusion.run.metrics import SweepPoint


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a handwritten one|a handwritten two", "one|two"),
        ("a cat|a cat asleep", "a cat|a cat asleep"),  # nothing would be left of the first
        ("horse|red horse", "horse|red horse"),
        ("a cat", "a cat"),
        ("0|1", "0|1"),
    ],
)
def test_prompts_are_distinct_endings_by_the_words_they_do_not_share(names, expected):
    assert distinct_endings(names.split("|")) == expected.split("|")


@pytest.mark.parametrize(
    ("name", "lines"),
    [("7", ["7"]), ("", [""]), ("fifty three", ["fifty", "three"]), ("dark blue old boots", ["dark", "blue ol…"])],
)
def test_a_column_has_its_words_below_each_other(name, lines):
    assert stacked(name).split("\n") == lines


def test_the_page_of_the_races_shows_how_the_gap_grows(tmp_path):
    """The rows of growing dimensions get a picture of their own; without them the page does not speak of it."""
    row = {
        "learner": "adjoint", "warmed_by": None, "schedule": GROWING.schedule, "likelihood": GROWING.likelihood,
        "steps": 25, "gamma": GROWING.gamma, "spread": 0.4, "objective_nats": -1.0, "log_z_nats": -0.9,
        "gap_nats": 0.1, "gap_stderr": 0.01, "gap_floor_nats": None, "true_kl_nats": None, "energy_p_value": None,
    }  # fmt: skip
    rows = [
        {**row, "dim": 2, "seconds": 10.0, "true_kl_nats": 0.05, "gap_floor_nats": 0.04},
        {**row, "dim": 32, "seconds": 20.0},
    ]
    axis = torch.linspace(-4, 4, 9)
    picture = Picture("adjoint", GROWING, torch.zeros(5, 2), axis, torch.rand(9, 9))
    for name, given in (("grown", rows), ("flat", rows[:1])):
        folder = tmp_path / name
        folder.mkdir()
        write_exact_report(folder, given, [picture], "ctrl exact", "0")
        assert (folder / "growth.png").is_file() == (name == "grown")
        page = (folder / "report.html").read_text()
        assert page.count("data:image/png;base64,") == 2 + (name == "grown")
        assert ("Beyond two dimensions" in page) == (name == "grown")


def test_the_page_of_a_classifier_shows_its_figures(tmp_path):
    settings = ClassifierSettings(head="ordinal", grid=1, depth=1, updates=300)
    panel, held_out = fit_panel(labelled_digits("ink", 0)[0][0], "ink", settings=settings)
    panel.quality = replace(panel.quality, brier=0.1234, auroc=0.9876)
    write_classifier_report(tmp_path, panel, held_out)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for shown in ("0.123", "0.988", "Brier", "AUROC"):
        assert shown in page
    panel.quality = replace(panel.quality, auroc=None)
    write_classifier_report(tmp_path, panel, held_out)
    assert "a class is missing" in (tmp_path / "report.html").read_text()


def test_no_line_of_the_sweep_is_cut_off():
    """The panels share an axis, and either may reach higher."""

    def point(diversity, strength=None, steps=None):
        return SweepPoint(strength, steps, 0.9, 0.01, 0.8, diversity)

    sweep = {
        "strength": [point(1.0, strength=0.0), point(1.1, strength=1.0)],
        "steps": [point(0.9, steps=10), point(1.6, steps=40)],
    }
    panels = sweep_figure(sweep, 0.9, 10).axes
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.6 for axes in panels)
