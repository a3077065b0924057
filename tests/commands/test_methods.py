"""Every row of METHODS, and rows from outside the package, without a run."""

from types import SimpleNamespace

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.commands.jobs.compare import averaged
from ctrl_diffusion.commands.jobs.comparison import STRENGTHS
from ctrl_diffusion.commands.jobs.methods import METHODS, MethodSpec
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.guide.method import Method
from ctrl_diffusion.guide.steered import Guidance
from ctrl_diffusion.report.compare import STYLES, by_method, pareto_figure

PRIOR = GaussianMixture(torch.zeros(1, 2), 1.0, Cosine())
MODELS = SimpleNamespace(
    run=SimpleNamespace(policy="policy", prior=SimpleNamespace(denoiser=PRIOR)), noisy={}, regressed="regressed",
    variance=0.5,
)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_row_makes_its_method_with_every_trial(name):
    spec = METHODS[name]
    trials = spec.settings(STRENGTHS)
    assert len(trials) in (1, len(STRENGTHS)), "as many trials for each, or nothing to try"
    for settings, strength in trials:
        method, denoiser = spec.make(MODELS, **settings)
        assert isinstance(method, Method)
        assert denoiser == {"ctrl": "policy", "free-guidance": "regressed"}.get(name, PRIOR)
        assert all(getattr(method, key) == value for key, value in settings.items())
        assert (strength == 1.0) or not settings, "settings or strengths are tried, not both"
    assert isinstance(method, Guidance) == (spec.trials is None)
    assert spec.front == isinstance(method, Guidance)


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
