"""Every row of METHODS, and rows from outside the package, without a run."""

import math
from types import SimpleNamespace

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.commands.jobs.compare import averaged
from ctrl_diffusion.commands.jobs.comparing.comparison import STRENGTHS
from ctrl_diffusion.commands.jobs.comparing.methods import METHODS, MethodSpec, choose_settings
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.guide.method import Method
from ctrl_diffusion.guide.steered import Guidance
from ctrl_diffusion.report.compare import STYLES, by_method, pareto_figure

PRIOR = GaussianMixture(torch.zeros(1, 2), 1.0, Cosine())
MODELS = SimpleNamespace(
    run=SimpleNamespace(policy="policy", prior=SimpleNamespace(denoiser=PRIOR)), noisy={}, regressed="regressed",
    variance=0.5,
)  # fmt: skip


def tried(spec, score, fails=lambda settings, w: False):
    """Try a method until it has no next trial; the score of a trial by its settings and strength."""
    trials = []
    while trial := spec.next_trial(trials, STRENGTHS):
        assert trial not in [done[:2] for done in trials]
        trials.append((*trial, None if fails(*trial) else (score(*trial), None)))
    return trials


def peak(spec, at):
    return lambda settings, w: -abs(math.log(spec.value(settings, w) / at))


@pytest.mark.parametrize("name", METHODS)
def test_every_row_makes_its_method_with_every_trial(name):
    spec = METHODS[name]
    for settings, *_ in tried(spec, peak(spec, 2)):
        method, denoiser = spec.make(MODELS, **settings)
        assert isinstance(method, Method)
        assert denoiser == {"ctrl": "policy", "free-guidance": "regressed"}.get(name, PRIOR)
        assert all(getattr(method, key) == value for key, value in settings.items())
    assert spec.front == isinstance(method, Guidance)


@pytest.mark.parametrize("at", [1.5, 3.0, 30.0])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_turned_up_until_its_best_lies_inside(name, at):
    """All by the same grid of strengths, the best of n, which does not see it, by n; other settings at the best."""
    spec = METHODS[name]
    trials = tried(spec, peak(spec, at))
    values = spec.on_knob(trials)
    best = spec.knob.best(values)
    assert min(values) < best < max(values)
    assert best / 2**0.51 < at < best * 2**0.51
    assert [spec.point(value) for value in spec.grid(STRENGTHS)] == [trial[:2] for trial in trials[: len(STRENGTHS)]]
    settings, w = spec.point(best)
    assert [trial[:2] for trial in trials[len(values) :]] == [({**settings, **other}, w) for other in spec.trials]
    assert (spec.knob.setting == "n") == (name == "best-of")


def test_what_fails_ends_the_grid_above_it():
    spec = METHODS["rejection"]
    trials = tried(spec, lambda settings, w: w, fails=lambda settings, w: w > 1.5)
    assert [(w, scores is None) for _, w, scores in trials] == [(0.5, False), (1.0, False), (2.0, True)]
    assert tried(spec, lambda settings, w: w, fails=lambda *_: True) == [({}, 0.5, None)]


def test_one_rule_chooses_and_equals_are_the_nearest_to_one():
    def row(w, accuracy, coverage, gap, **more):
        figures = {"accuracy": accuracy, "coverage": coverage, "gap_nats": gap, "gap_stderr": 0.1}
        return {"method": "dps", "trial": True, "settings": {}, "strength": w, **figures, **more}

    rows = [row(0.25, 0.5, 0.5, 3.0), row(0.5, 0.9, 0.3, 2.0), row(2.0, 0.6, 0.6, 9.0), row(1.0, 0.6, 0.6, 5.0)]
    chosen = choose_settings([*rows, row(4.0, 1.0, 1.0, 0.0, trial=False)])["dps"]
    assert (chosen["strength"], chosen["trials"], chosen["on_edge"]) == (1.0, 4, [])
    assert chosen["nearest"] == {"strength": 0.5, "gap_nats": 2.0, "gap_stderr": 0.1}
    edge = choose_settings([row(1 / 64, 0.9, 0.9, 1.0), *rows])["dps"]
    assert edge["on_edge"] == [1 / 64, 1 / 64]
    particles = choose_settings([row(1.0, 0.5, 0.5, None, method="tds", settings=s) for s in ({}, {"spread": 1.0})])
    assert particles["tds"]["settings"] == {}
    assert "nearest" not in particles["tds"]


def test_titles_and_styles_tell_methods_apart():
    assert len({spec.title for spec in METHODS.values()}) == len(METHODS)
    assert list(STYLES) == list(METHODS)
    assert len(set(STYLES.values())) == len(STYLES)


def test_a_method_from_outside_is_averaged_and_drawn(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", MethodSpec("my own", lambda models: METHODS["dps"].method(models)))
    assert METHODS["mine"].make(MODELS)[1] is PRIOR
    key = {"labels": 50, "seed": 0, "strength": 1.0, "settings": {}, "trial": False}
    figures = {"accuracy": 0.5, "accuracy_stderr": 0.1, "diversity_ratio": 0.9, "frechet": 2.0}
    chosen = {name: {"settings": {}, "strength": 1.0} for name in ("mine", "ctrl", "gone")}
    rows = averaged([{"method": name, **key, **figures} for name in chosen], chosen)
    assert [row["title"] for row in rows] == ["my own", "CTRL", "gone"], "a row that was kept may outlive its method"
    assert list(by_method(rows)) == ["ctrl", "mine", "gone"]
    axes = pareto_figure(rows, figures, 0.8, 50).axes[0]
    assert {"my own", "CTRL", "gone"} <= set(axes.get_legend_handles_labels()[1])
