"""The gradient of J against finite differences, and what truncation and clipping do to it."""

import pytest
import torch

from ctrl_diffusion.chain.denoise import Denoiser
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.chain.transition import step_std, transition
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.reward.reward import Reward


def toy(schedule=None):
    torch.manual_seed(0)
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    prior = GaussianMixture(means, 0.5, schedule or Cosine())
    policy = Policy(prior, SideControl("y", ("a", "b"), prior, width=8).double())
    with torch.no_grad():
        for parameter in policy.controls["y"].parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy, Reward({"y": ComponentLabel(prior)}), Conditions({}, {"y": 2}), prior.schedule.times(6, 0.1)


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


class Shifted(Denoiser):
    """A policy with one number for every step: x̂ = x̂_pre + θ_i at time t_i."""

    def __init__(self, prior, times, value):
        super().__init__()
        self.base, self.schedule, self.shape = prior, prior.schedule, prior.shape
        self.place = {t: i for i, t in enumerate(times)}
        self.theta = torch.nn.Parameter(torch.full((len(times) - 1,), value, dtype=torch.float64))

    @property
    def prior(self):
        return self.base

    def forward(self, x_t, t, labels=None):
        return self.base(x_t, t) + self.theta[self.place[t]]


def linear():
    """A standard normal prior and the reward b·x_0 with b = (3, 4): every gradient is known."""
    prior = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), 1.0, Cosine())
    times = prior.schedule.times(6, 0.1)
    return prior, times, lambda x_0, labels, cond: x_0 @ torch.tensor([3.0, 4.0], dtype=torch.float64)


def theta_gradient(value, reward, options):
    prior, times, linear_reward = linear()
    policy = Shifted(prior, times, value)
    torch.set_default_dtype(torch.float64)
    try:
        learner = Backprop(times, batch=8, **options)
        steps = learner(policy, reward or linear_reward, Conditions({}, {"y": 2}), torch.Generator().manual_seed(1))
        first = next(steps)
        first.loss.backward()
        return policy.theta.grad, next(steps).metrics
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("through", [1, 2, 5, 6, None])
def test_truncation_lets_the_reward_reach_the_last_steps_only(through):
    gradient, _ = theta_gradient(0.0, None, {"clip": float("inf"), "through": through})
    whole, _ = theta_gradient(0.0, None, {"clip": float("inf")})
    reached = 6 if through is None else through
    # at θ = 0 the KL has no gradient: all there is comes from the reward
    assert torch.equal(gradient[: 6 - reached], torch.zeros(6 - reached, dtype=torch.float64))
    torch.testing.assert_close(gradient[6 - reached :], whole[6 - reached :])
    assert (whole.abs() > 1e-3).all()


@pytest.mark.parametrize("through", [1, 3, None])
def test_truncation_keeps_every_steps_own_kl(through):
    def nothing(x_0, labels, cond):
        return 0.0 * x_0.sum(1)

    gradient, _ = theta_gradient(0.5, nothing, {"clip": float("inf"), "through": through})
    prior, times, _ = linear()
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x = torch.zeros(1, 2, dtype=torch.float64)
        shifted = transition(Shifted(prior, times, 1.0), x, t, s)
        per_theta = (shifted.mean - transition(prior, x, t, s).mean)[0, 0] / shifted.std
        # ½‖u‖² with u = θ · per_theta in both dimensions
        torch.testing.assert_close(gradient[i], 2 * 0.5 * per_theta.detach() ** 2)


def test_clipping_is_per_sample_and_logged():
    """Every path's gradient at the last state is b shrunk by the read-out; a limit of half its length halves it."""
    prior, times, _ = linear()
    unit = torch.ones(1, 1, dtype=torch.float64)
    shrink = float((prior(unit.expand(1, 2), times[-1]) - prior(0 * unit.expand(1, 2), times[-1]))[0, 0])
    std = float(step_std(prior.schedule, times[-2], times[-1]))
    whole, free = theta_gradient(0.0, None, {"clip": float("inf")})
    half, clipped = theta_gradient(0.0, None, {"clip": 5.0 * shrink * std / 2})
    just, _ = theta_gradient(0.0, None, {"clip": 5.0 * shrink * std * 1.01})
    assert free["clipped"] == 0.0
    assert clipped["clipped"] > 0.0
    torch.testing.assert_close(just[-1], whole[-1])
    # the last step's own parameter sees the clip at the last state and no other
    torch.testing.assert_close(half[-1], whole[-1] / 2)
