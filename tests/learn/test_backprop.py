"""The gradient of J against finite differences, and what truncation and clipping do to it."""

import pytest
import torch

from ctrl_diffusion.control import Policy, SideControl
from ctrl_diffusion.data import Conditions
from ctrl_diffusion.exact import GaussianMixture
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.reward import Reward
from ctrl_diffusion.schedule import Cosine, RectifiedFlow


def toy(schedule=None):
    torch.manual_seed(0)
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    prior = GaussianMixture(means, 0.5, schedule or Cosine())
    policy = Policy(prior, SideControl("y", ("a", "b"), prior, width=8).double())
    with torch.no_grad():
        for parameter in policy.controls["y"].parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy, Reward({"y": prior}), Conditions({}, "y", 2), prior.schedule.times(6, 0.1)


def loss_of(setup, **options):
    """The learner's first loss, always on the same noise, in double precision."""
    policy, reward, conditions, times = setup
    torch.set_default_dtype(torch.float64)
    try:
        learner = Backprop(times, batch=8, **options)
        return next(learner(policy, reward, conditions, torch.Generator().manual_seed(1)))
    finally:
        torch.set_default_dtype(torch.float32)


def parameters(setup):
    return sum(setup[0].parameter_groups().values(), [])


def gradient(setup, **options):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(setup, **options).loss, parameters(setup))])


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_the_gradient_of_j_against_finite_differences(schedule):
    setup = toy(schedule)
    found = gradient(setup, clip=float("inf"))
    generator, h = torch.Generator().manual_seed(3), 1e-5
    for _ in range(5):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters(setup)]
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters(setup), direction, strict=True):
                    p.add_(sign * h * d)
                ends.append(float(loss_of(setup).loss))
                for p, d in zip(parameters(setup), direction, strict=True):
                    p.sub_(sign * h * d)
        along = float(found @ torch.cat([d.flatten() for d in direction]))
        # central differences: error h² f‴/6 ~ 1e-10 times the scale of f‴, rounding 1e-16 f/h ~ 1e-10
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(along, rel=1e-5, abs=1e-6)


def test_truncation_cuts_the_reward_and_keeps_every_kl():
    setup = toy()
    whole, cut = gradient(setup, clip=float("inf")), gradient(setup, clip=float("inf"), through=1)
    assert torch.equal(gradient(setup, clip=float("inf"), through=6), whole)
    assert not torch.allclose(cut, whole, rtol=1e-2)
    # with no reward at all, a state's own KL is still there for every step: by hand, states detached
    policy, _, conditions, times = setup
    silent = (policy, Reward({"y": policy.prior}, gamma=0.0), conditions, times)
    found = gradient(silent, clip=float("inf"), through=1)
    assert float(found.norm()) > 0
    untruncated = gradient(silent, clip=float("inf"))
    assert not torch.allclose(found, untruncated), "a later KL's way back through the states is cut too"


def test_clipping_is_per_sample_and_logged():
    setup = toy()
    assert torch.equal(gradient(setup, clip=1e6), gradient(setup, clip=float("inf")))
    policy, reward, conditions, times = setup
    torch.set_default_dtype(torch.float64)
    try:
        steps = Backprop(times, batch=8, clip=1e-6)(policy, reward, conditions, torch.Generator().manual_seed(1))
        first = next(steps)
        first.loss.backward()
        second = next(steps)
    finally:
        torch.set_default_dtype(torch.float32)
    assert first.metrics["clipped"] == 0.0
    assert second.metrics["clipped"] == 1.0
    assert {"reward", "kl", "clipped"} == set(second.metrics)
