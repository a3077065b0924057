"""Adjoint matching (Domingo-Enrich et al. 2025): regress the control on the adjoint of the reward.

Roll out the policy without a graph. Along each path the lean adjoint carries the reward's gradient back through the
*prior's* chain only,

    a_N = ∇_x r(x_0(x_N)),      a_i = (∂mean_pre,i/∂x_i)ᵀ a_{i+1},

and the whitened control is regressed on it, ½‖u_i − std_i a_{i+1}‖², at a few steps of each path. The least-squares
solution is the soft-optimal control in the limit of small steps, and no gradient flows through a rollout.

Adjoints are heavy-tailed, so each is clipped per sample and per step: one clip of the batch's gradient would let a few
paths own the update.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..control import Policy
from ..data import Conditions
from ..denoise import Denoiser
from ..reward import Reward
from ..rollout import Times, Trajectory, read_out, rollout
from ..transition import half_square, step_std, transition
from . import Step


def clip_rows(a: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Scale rows of a (B, *) down to norm `limit`; also says which rows (B,) were longer."""
    norm = a.flatten(1).norm(dim=1)
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1.0)
    return a * factor.view(-1, *[1] * (a.ndim - 1)), norm > limit


def lean_adjoint(
    prior: Denoiser,
    path: Trajectory,
    reward_gradient: Tensor,
    cond: dict[str, Tensor],
    eta: float = 1.0,
    clip: float = float("inf"),
) -> tuple[Tensor, Tensor, float]:
    """Adjoints of a path through the prior's chain.

    Args:
        prior: the prior's denoiser.
        path: N steps of B samples.
        reward_gradient: a_N (B, *), the gradient of the reward at the last state.
        cond: the prior's conditions.
        eta: churn.
        clip: largest norm of an adjoint, per sample and step.

    Returns:
        a_1 … a_N (N, B, *); the prior's means of each step (N, B, *); the share of adjoints that were clipped.
    """
    a, clipped = clip_rows(reward_gradient, clip)
    adjoints, means, count = [a], [], clipped.float().mean()
    steps = len(path.times) - 1
    for i in reversed(range(steps)):
        with torch.enable_grad():
            x_t = path.x[i].detach().requires_grad_()
            mean = transition(prior, x_t, path.times[i], path.times[i + 1], eta, **cond).mean
            (a,) = torch.autograd.grad(mean, x_t, a) if i > 0 else (None,)
        means.append(mean.detach())
        if i > 0:
            a, clipped = clip_rows(a, clip)
            count = count + clipped.float().mean()
            adjoints.append(a)
    return torch.stack(adjoints[::-1]), torch.stack(means[::-1]), float(count / steps)


@dataclass
class Adjoint:
    """The learner.

    Args:
        times: the chain's grid.
        batch: paths a rollout.
        regressed: steps of each path that one update regresses; every path goes through its steps in its own order.
        reuse: updates from one rollout.
        clip: largest norm of an adjoint, per sample and step.
        eta: churn of the chain; must be positive.
    """

    times: Times
    batch: int = 160
    regressed: int = 5
    reuse: int = 4
    clip: float = 60.0
    eta: float = 1.0

    def __call__(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: torch.Generator
    ) -> Iterator[Step]:
        """Losses without end."""
        steps = len(self.times) - 1
        t_grid, s_grid = (torch.tensor(times, dtype=torch.float64) for times in (self.times[:-1], self.times[1:]))
        std = step_std(policy.schedule, t_grid, s_grid, self.eta)
        while True:
            labels, cond = conditions.of(conditions.draw(self.batch, generator))
            x_1 = torch.randn(self.batch, *policy.shape, generator=generator)
            with torch.no_grad():
                path = rollout(policy, x_1, self.times, self.eta, generator, cond=cond, labels=labels)
            with torch.enable_grad():
                x_end = path.x[-1].requires_grad_()
                earned = reward(read_out(policy, x_end, self.times[-1], **cond), labels)
                (gradient,) = torch.autograd.grad(earned.sum(), x_end)
            adjoints, means, clipped = lean_adjoint(policy.prior, path, gradient, cond, self.eta, self.clip)
            # for each path its own order of steps
            every = torch.rand(steps, self.batch, generator=generator).argsort(0)
            for k in range(self.reuse):
                i = every[k * self.regressed % steps :][: self.regressed]  # (R, B)
                rows = torch.arange(self.batch).expand_as(i)
                i, rows = i.flatten(), rows.flatten()
                sigma = std[i].to(x_1).view(-1, *[1] * (x_1.ndim - 1))
                here = transition(
                    policy, path.x[i, rows], t_grid[i], s_grid[i], self.eta,
                    labels={name: y[rows] for name, y in labels.items()}, **{name: c[rows] for name, c in cond.items()},
                )  # fmt: skip
                u = (here.mean - means[i, rows]) / sigma
                loss = steps * half_square(u - sigma * adjoints[i, rows]).mean()
                yield Step(
                    loss,
                    {
                        "reward": float(earned.detach().mean()),
                        "kl": float(steps * half_square(u.detach()).mean()),
                        "clipped": clipped,
                    },
                )
