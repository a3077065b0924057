"""The cost of a learner is counted in evaluations of the network, and timed once."""

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.step import Speed, cost_of_update, measure_speed
from ctrl_diffusion.learn.table import LEARNERS
from ctrl_diffusion.learn.weighted import Weighted


@pytest.mark.parametrize("name", LEARNERS)
def test_an_evaluation_with_its_gradient_counts_three(name):
    settings = LEARNERS[name].Settings(updates=5, batch=7)
    forward, both = settings.evaluations(10)
    assert cost_of_update(settings, 10) == 7 * (forward + 3 * both)
    assert Speed(1.0, 3.0).of_update(settings, 10) == cost_of_update(settings, 10)


@pytest.mark.parametrize(("ratio", "updates", "renoising"), [(0.5, 50, 10), (2.5, 250, 50), (1e-6, 1, 0), (1, 100, 20)])
def test_settings_are_scaled_with_what_prepares_them(ratio, updates, renoising):
    scaled = Weighted.Settings(updates=100, renoising=20).scaled(ratio)
    assert (scaled.updates, scaled.renoising) == (updates, renoising)
    assert Adjoint.Settings(updates=100).scaled(ratio).updates == updates


@pytest.mark.parametrize("micro", [None, 3])
def test_the_speed_is_measured_and_leaves_no_trace(micro, monkeypatch):
    """By a clock that ticks at every look, an evaluation with its gradient takes a tick as well as one without."""
    prior = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3, Cosine())
    policy = Policy(prior, SideControl("y", ("a", "b"), prior, width=4))
    before, state = policy.snapshot(), torch.get_rng_state()
    ticks = iter(range(1000))
    monkeypatch.setattr("ctrl_diffusion.learn.step.time.perf_counter", lambda: float(next(ticks)))
    speed = measure_speed(policy, prior.times(4, 0.05), Conditions({}, {"y": 2}), batch=8, micro=micro)
    assert speed == (1 / 8, 1 / 8)
    assert all(map(torch.equal, before, policy.snapshot()))
    assert all(p.grad is None for p in policy.trainable())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize("batch", [0, 2**20 + 1, 2**31])
def test_a_batch_without_reason_is_refused(learner, batch):
    with pytest.raises(ValueError, match="batch"):
        learner.Settings(batch=batch)
    assert learner.Settings(batch=2**20).batch == 2**20
