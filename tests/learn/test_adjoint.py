import pytest
import torch

from ctrl_diffusion.denoise import as_denoiser
from ctrl_diffusion.learn.adjoint import clip_rows, lean_adjoint
from ctrl_diffusion.rollout import rollout
from ctrl_diffusion.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.transition import transition

WEIGHT = 0.4 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PRIORS = {
    "linear": lambda x, timestep: x @ WEIGHT,
    "nonlinear": lambda x, timestep: torch.tanh(x @ WEIGHT) * x,
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_the_adjoint_is_autograd_through_the_chain(name, schedule):
    """With the noise held fixed, a_i is the gradient of the reward with respect to x_i, through every later step."""
    prior, times = as_denoiser(PRIORS[name], schedule, (3,)), schedule.times(6, 0.1)
    path = rollout(prior, torch.randn(4, 3, dtype=torch.float64), times, generator=torch.Generator().manual_seed(1))
    end = path.x[-1].requires_grad_()
    (gradient,) = torch.autograd.grad(end.pow(3).sum(), end)
    adjoints, means, clipped = lean_adjoint(prior, path, gradient, {})

    x_t, states = path.x[0].clone(), []
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        here = transition(prior, x_t, t, s)
        torch.testing.assert_close(means[i], here.mean.detach())
        x_t = (here.mean + (path.x[i + 1] - here.mean).detach()).requires_grad_()
        states.append(x_t)
    for expected, ours in zip(torch.autograd.grad(x_t.pow(3).sum(), states), adjoints, strict=True):
        torch.testing.assert_close(ours, expected)
    assert clipped == 0.0


def test_clipping_is_per_sample():
    rows, clipped = clip_rows(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]), 1.0)
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert clipped.tolist() == [True, False, False]
