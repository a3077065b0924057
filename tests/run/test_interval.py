"""How a run chooses where its control speaks, and where its chain spends its steps."""

import pytest
import torch
from torch import tensor

from ctrl_diffusion.evaluate.information import Profile
from ctrl_diffusion.run import measure
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.measure import Probe, find_intervals, prior_samples, refine_intervals

AUTO = {"interval": "auto"}


@pytest.fixture
def run(start_ink):
    return lambda control, **values: start_ink(control, **{"steps": 12, **values})


def test_ink_is_decided_late_so_its_control_speaks_nearly_everywhere(run):
    """Ink is the mean pixel: p̂ of x̂ learns of it until noise is a few hundredths. The config holds what was chosen."""
    run = run(AUTO, focus="auto", evaluation={"paths": 200})
    find_intervals(run)
    control, settings = run.policy.controls["ink"], run.config.controls[0]
    off, on = control.interval
    assert off < 0.25
    assert on > 0.9
    assert settings.interval == control.interval
    assert run.config.focus == "none" or run.config.focus[0] == pytest.approx(off, rel=1e-3)
    assert Config.from_values(run.config.model_dump()) == run.config


@pytest.mark.parametrize(
    ("control", "paths"), [(AUTO, 199), ({"interval": "none"}, 1000), ({"interval": (0.2, 0.8)}, 1000), ({}, 1000)]
)
def test_what_is_not_measured_stays_as_it_is(run, control, paths, monkeypatch):
    run = run(control, evaluation={"paths": paths})
    monkeypatch.setattr(measure, "profiles_of", lambda *_: pytest.fail("nothing is to be measured"))
    find_intervals(run)
    expected = control.get("interval") if isinstance(control.get("interval"), tuple) else None
    assert run.policy.controls["ink"].interval == expected
    assert run.config.controls[0].interval == (expected or "none")
    assert run.config.focus == "none"


@pytest.mark.parametrize(("interval", "share"), [((0.6, 0.95), 2.0), ((0.05, 1.0), 1.0)])
def test_the_focus_is_where_the_control_speaks(run, interval, share, monkeypatch):
    """It gets more of the steps, two thirds at most; a chain that is nearly all inside stays as it is."""
    run = run(AUTO, focus="auto", steps=40)
    before = sum(interval[0] <= float(run.policy.schedule(t)[1]) <= interval[1] for t in run.times[:-1])
    monkeypatch.setattr(Profile, "interval", lambda *_: interval)
    monkeypatch.setattr(measure, "profiles_of", lambda *_: {"ink": Profile((), [], 0.0)})
    find_intervals(run)
    active = len(run.policy.active_steps(run.times))
    if share == 1.0:
        assert run.config.focus == "none"
        return
    assert before < active <= 40 * 2 / 3 + 1
    assert len(run.times) == 41
    assert run.times_of(20)[0] == run.times[0]


def test_states_to_learn_from_are_those_where_the_control_speaks(run):
    run = run({"interval": (0.3, 0.7)})
    kept = prior_samples(run, run.conditions, 6, "test", states=3)
    active = set(run.policy.active_steps(run.times).tolist())
    assert kept.steps.shape == (12, min(3, len(active)))
    assert set(kept.steps.flatten().tolist()) <= active
    assert torch.equal(kept.x_0, prior_samples(run, run.conditions, 6, "test"))


@pytest.mark.parametrize("best", [(0.1, 0.99), (0.45, 0.99), (0.1, 0.75), (0.45, 0.75)])
def test_both_ends_move_inwards_as_long_as_j_rises(run, best, monkeypatch):
    """J falls with the distance, in steps, from the best interval; the ends stop within an eighth of it."""
    run = run({"interval": (0.1, 0.99)}, steps=24)
    sigmas = [float(run.policy.schedule(t)[1]) for t in run.times[:-1]]

    def inside(interval):
        return {i for i, sigma in enumerate(sigmas) if interval[0] <= sigma <= interval[1]}

    def probe(run, repeats):
        far = len(inside(run.policy.controls["ink"].interval) ^ inside(best))
        log_w = tensor([-1.0, -1.1, -0.9, -1.0]) - far + 0.01 * torch.arange(4)
        return Probe({"J": float(log_w.mean())}, log_w, log_w)

    monkeypatch.setattr(measure, "probe", probe)
    first = probe(run, 1)
    last = refine_intervals(run, first, 1)
    assert len(inside(run.policy.controls["ink"].interval) ^ inside(best)) <= 3
    assert last.figures["J"] >= first.figures["J"]
    assert torch.equal(last.log_w, probe(run, 1).log_w), "it is the probe of what is left"


def test_what_is_fixed_or_speaks_everywhere_is_not_refined(run, monkeypatch):
    monkeypatch.setattr(measure, "probe", lambda *_: pytest.fail("nothing is to be tried"))
    everywhere, current = run({}), Probe({}, torch.zeros(2), torch.zeros(2))
    assert refine_intervals(everywhere, current, 1) is current
    fixed = everywhere.policy.controls["ink"]
    fixed.interval = (0.2, 0.8)
    fixed.fix()
    assert refine_intervals(everywhere, current, 1) is current
