"""What metrics.json says of a whole run."""

import math
from types import SimpleNamespace

import pytest
import torch

from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.evaluate.verdict import Climb, Gain
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.run.metrics import intervals_of, last_climb, scale_metrics, verdict_of

GOOD = {"ink": {"nll": 0.4, "chance_nll": 1.39}}


def evaluation(gain, prior, ctrl, target):
    scores = {
        name: SimpleNamespace(accuracy=accuracy, accuracy_stderr=0.01)
        for name, accuracy in {"prior": prior, "ctrl": ctrl, "target": target}.items()
    }
    return SimpleNamespace(**scores, gained=Gain(gain, 0.1), clipped=None)


@pytest.mark.parametrize(
    ("gain", "prior", "ctrl", "target", "learned"),
    [
        (2.0, 0.25, 0.90, 0.95, True),
        (2.0, 0.25, 0.25, 0.95, False),  # only its surest misses are less sure
        (2.0, 0.25, 0.26, 0.95, False),  # within the error
        (-1.0, 0.25, 0.90, 0.95, False),  # right, at a price above what it earns
        (2.0, 0.95, 0.95, 0.955, True),  # nothing to be had
    ],
)
def test_a_control_has_learned_if_j_and_what_is_right_rose(gain, prior, ctrl, target, learned):
    assert verdict_of(evaluation(gain, prior, ctrl, target), GOOD, [{}, {}], False).learned is learned


def test_what_could_not_be_measured_on_a_scale_is_left_out():
    requested, measured = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.5, torch.nan, 2.5, 3.5])
    figures = scale_metrics(requested, measured)
    assert (figures["samples"], figures["mean_error_levels"]) == (3, 0.5)
    assert figures["r2"] == pytest.approx(1 - 3 * 0.25 / float((requested[[0, 2, 3]] - 5 / 3).square().sum()))
    nothing = scale_metrics(requested, torch.full((4,), torch.nan))
    assert nothing["samples"] == 0
    assert math.isnan(nothing["r2"])


def test_intervals_are_reported_with_the_steps_inside():
    schedule, times = RectifiedFlow(), (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)  # σ = t
    controls = {}
    for name, interval in {"late": (0.0, 0.4), "early": (0.6, 1.0), "always": None}.items():
        prior = GaussianMixture(torch.zeros(1, 2), 1.0, schedule)
        controls[name] = SideControl(name, ("a", "b"), prior)
        controls[name].interval = interval
    run = SimpleNamespace(times=times, policy=SimpleNamespace(schedule=schedule, controls=controls))
    assert intervals_of(run) == {
        "late": {"sigma_off": 0.0, "sigma_on": 0.4, "steps": 2, "of_steps": 5},
        "early": {"sigma_off": 0.6, "sigma_on": 1.0, "steps": 3, "of_steps": 5},
    }


def test_a_refined_interval_hides_no_climb():
    """The last record is that of the kept control; one of refined intervals may come before it."""
    averaged = {"stage": "weighted", "averaged": True, "rose": 0.5, "rose_stderr": 0.1, "rose_over": 30}
    refined, kept = {"stage": "weighted", "J": -2.0, "intervals": {}}, {"kept": True}
    assert last_climb([averaged, refined, kept]) == last_climb([averaged, kept]) == Climb(0.5, 0.1, 30)
    assert last_climb([averaged, {"stage": "adjoint", "stopped": "lost"}, kept]) is None
    assert last_climb([{**averaged, "decay_from": 80}, kept]).full_rate
