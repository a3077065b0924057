import weakref

import pytest
import torch

from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn import adjoint
from ctrl_diffusion.learn.adjoint import adjoints_of
from ctrl_diffusion.learn.on_policy import clip_rows
from ctrl_diffusion.prior.network import as_denoiser

WEIGHT = 0.4 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PRIORS = {
    "linear": lambda x, timestep: x @ WEIGHT,
    "nonlinear": lambda x, timestep: torch.tanh(x @ WEIGHT) * x,
}


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_the_adjoint_is_autograd_through_the_chain(name, schedule, lean):
    """With the noise held fixed, a_i is the gradient with respect to x_i, through every later step, of the reward
    along the prior's chain (lean) or of log w along the policy's.
    """
    prior, times = as_denoiser(PRIORS[name], schedule, (3,)), schedule.times(6, 0.1)
    policy = Policy(prior, SideControl("y", ("a", "b"), prior, width=8).double())
    with torch.no_grad():
        for parameter in policy.controls["y"].parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    labels = {"y": torch.tensor([0, 1, 0, 1])}
    x_1, generator = torch.randn(4, 3, dtype=torch.float64), torch.Generator().manual_seed(1)
    with torch.no_grad():
        path = rollout(policy, x_1, times, generator=generator, labels=labels)
    end = path.x[-1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(end.pow(3).sum(), end)
    adjoints, means, clipped = adjoints_of(policy, path, gradient, labels, {}, lean=lean)

    states, value = [path.x[0].clone().requires_grad_()], 0.0
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        pre, here = transition(prior, states[i], t, s), transition(policy, states[i], t, s, labels=labels)
        torch.testing.assert_close(means[i], pre.mean.detach())
        z = ((path.x[i + 1] - here.mean) / here.std).detach()
        u = here.control(pre)
        if not lean:
            value = value - (0.5 * u.square() + u * z).sum()
        states.append((pre.mean + (path.x[i + 1] - pre.mean).detach()) if lean else here.rsample(z))
        torch.testing.assert_close(states[-1].detach(), path.x[i + 1])
    expected = torch.autograd.grad(value + states[-1].pow(3).sum(), states[1:])
    for theirs, ours in zip(expected, adjoints, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert clipped == 0.0


class Optimal(GaussianMixture):
    """N(0, 1) tilted by r(x_0) = −½ κ x_0²: the posterior's own denoiser, optimal as the steps go to zero."""

    def __init__(self, prior, schedule, precision):
        super().__init__(torch.zeros(1, 1, dtype=torch.float64), (1 + precision) ** -0.5, schedule)
        self.base = prior

    @property
    def prior(self):
        return self.base

    def forward(self, x_t, t, labels=None):
        return super().forward(x_t, t)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_at_the_optimum_the_martingale_takes_the_noise_away(schedule):
    """The adjoint's variance given the state falls like 1/steps at the optimum; the lean one's does not fall."""
    spread = {}
    for lean in (True, False):
        for steps in (20, 80):
            prior = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), 1.0, schedule)
            policy, times = Optimal(prior, schedule, 3.0), schedule.times(steps, 0.01, start=0.5)
            x_1 = torch.full((4000, 1), 0.5, dtype=torch.float64)  # one state, many paths from it
            with torch.no_grad():
                path = rollout(policy, x_1, times, generator=torch.Generator().manual_seed(0))
            gradient = -3.0 * path.x[-1]
            adjoints, _, _ = adjoints_of(policy, path, gradient, {}, {}, lean=lean)
            spread[lean, steps] = float(adjoints[0].var())
    # a quarter with four times the steps; 4,000 paths know a variance to 2 %
    assert spread[False, 80] < 0.4 * spread[False, 20]
    assert spread[True, 80] > 0.7 * spread[True, 20]
    assert spread[False, 80] < 0.2 * spread[True, 80]


def test_clipping_is_per_sample():
    rows, clipped = clip_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert clipped.tolist() == [True, False, False]


@pytest.mark.parametrize("lean", [True, False])
def test_a_step_of_the_adjoint_is_gone_before_the_next(monkeypatch, lean):
    """float16 keeps its graph for a second try: two steps' at once would be twice the memory."""
    prior, times = as_denoiser(PRIORS["nonlinear"], Cosine(), (3,)), Cosine().times(4, 0.1)
    policy, labels = Policy(prior, SideControl("y", ("a", "b"), prior).double()), {"y": torch.tensor([0, 1])}
    prior.loss_scale = 16.0
    with torch.no_grad():
        path = rollout(policy, torch.randn(2, 3, dtype=torch.float64), times, labels=labels)
    made = []

    def watched(denoiser, x_t, t, *rest, **options):
        assert all(mean() is None for at, mean in made if at != t)
        step = transition(denoiser, x_t, t, *rest, **options)
        made.append((t, weakref.ref(step.mean)))
        return step

    monkeypatch.setattr(adjoint, "transition", watched)
    adjoints_of(policy, path, torch.ones(2, 3, dtype=torch.float64), labels, {}, lean=lean)
    assert len(made) == (4 if lean else 7)
