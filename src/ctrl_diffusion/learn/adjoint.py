"""Adjoint matching: regress the control on the gradient of its own value-to-go (Domingo-Enrich et al. 2025).

Roll out the policy without a graph. With V_i the value-to-go of the policy along a path, the noise z held fixed,

    V_i(x_i) = V_{i+1}(mean_g(x_i) + std_i z_i) − ½‖u_i(x_i)‖² − u_i(x_i)·z_i,      V_N(x_N) = r(x_0(x_N)),

the adjoint a_i = ∇V_i is carried back by one vector-Jacobian product a step, and the whitened control is regressed on
it, ½‖u_i − std_i a_{i+1}‖², at a few steps of each path. On fresh paths the gradient of this loss is that of −J, step
by step, without a graph through the rollout; and at the optimum u_i = std_i E[a_{i+1}] holds for any number of steps.

The martingale term u·z changes no expectation but takes the noise away: for the optimal control V_i is the same on
every path from x_i in the limit of small steps, and so is its gradient (sticking the landing, Roeder et al. 2017).

The *lean* adjoint of the paper drops all terms in u, a_i = (∂mean_pre,i/∂x_i)ᵀ a_{i+1}: half the cost of a rollout, the
optimum only in the limit of small steps, and several times the variance when p̂ is steep (docs/lab-notes.md).

Adjoints are heavy-tailed, so each is clipped per sample and per step: one clip of the batch's gradient would let a few
paths own the update.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from pydantic import Field
from torch import Tensor

from ..chain.rollout import Trajectory, read_out
from ..chain.rows import parts
from ..chain.transition import half_square, transition
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..data.labels import Labels
from ..reward.reward import Reward
from .on_policy import OnPolicy, check_gradient, clip_rows, joined, pulled_back, revisit, visits
from .step import Carried, LearnerSettings, Step


def reward_gradient(
    policy: Policy, path: Trajectory, reward: Reward, labels: Labels, cond: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Reward (B,) of a path's ends and its gradient at the last state (B, *), through the read-out."""
    with torch.enable_grad():
        x_end = path.x[-1].detach().to(policy.device).requires_grad_()
        earned = reward(read_out(policy, x_end, path.times[-1], **cond), labels, cond)
        check_gradient(earned)
        gradient = pulled_back(policy, earned.sum(), x_end)
    return earned.detach(), gradient


def adjoints_of(
    policy: Policy,
    path: Trajectory,
    reward_gradient: Tensor,
    labels: Labels,
    cond: dict[str, Tensor],
    eta: float = 1.0,
    clip: float = float("inf"),
    lean: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """Adjoints along a path of the policy.

    Args:
        policy: that drew the path.
        path: N steps of B samples.
        reward_gradient: a_N (B, *), the gradient of the reward at the last state.
        labels, cond: of the path.
        eta: churn.
        clip: largest norm of std_i a_{i+1}, what one sample may ask of a step's control.
        lean: through the prior's chain only, without the terms in u.

    Returns:
        a_1 … a_N (N, B, *); the prior's means of each step (N, B, *); the share of adjoints that were clipped.
    """
    a, adjoints, means, longer = reward_gradient, [], [], []
    steps = len(path.times) - 1

    def back(i: int) -> Tensor | None:
        """The adjoint one step earlier; the graph that float16 keeps for a second try goes with the call."""
        t, s = path.times[i], path.times[i + 1]
        x_t = path.x[i].detach().to(policy.device).requires_grad_(i > 0)
        pre = transition(policy.prior, x_t, t, s, eta, **cond)
        means.append(pre.mean.detach())
        clipped, long = clip_rows(a, clip / pre.std)
        adjoints.append(clipped)
        longer.append(long.float().mean())  # read at the end: an accelerator need not be waited for
        if i == 0:
            return None
        if lean:
            value = (pre.mean * clipped).sum()
        else:
            here = transition(policy, x_t, t, s, eta, labels=labels, **cond)
            u = here.control(pre)
            value = (here.mean * clipped).sum() - half_square(u).sum() - (u * path.z[i].to(u.device)).sum()
        return pulled_back(policy, value, x_t)

    for i in reversed(range(steps)):
        with torch.set_grad_enabled(i > 0):  # nobody asks for a_0
            a = back(i)
    return torch.stack(adjoints[::-1]), torch.stack(means[::-1]), sum(torch.stack(longer).cpu().tolist()) / steps


@dataclass
class Adjoint(OnPolicy):
    """The learner.

    Args:
        times, batch, eta, micro, offload: see `OnPolicy`; adjoints and means are kept with the paths.
        regressed: steps of each path that one update regresses; every path goes through its steps in its own order.
        reuse: updates from one rollout.
        clip: largest norm of std_i a_{i+1}, what one sample may ask of a step's control.
        lean: use the lean adjoint.
    """

    batch: int = 160
    regressed: int = 5
    reuse: int = 4
    clip: float = 10.0
    lean: bool = False

    def __call__(
        self,
        policy: Policy,
        reward: Reward,
        conditions: Conditions,
        generator: torch.Generator,
        carried: Carried = None,
    ) -> Iterator[Step]:
        """Losses without end."""
        seen = self.regressed * self.batch  # transitions an update, by all ranks
        while True:
            with policy.frozen():
                with torch.no_grad():
                    drawn = list(self.fresh_paths(policy, conditions, generator, read=False))  # that comes next
                found = []
                for path, _, labels, cond in drawn:
                    earned, gradient = reward_gradient(policy, path, reward, labels, cond)
                    *two, share = adjoints_of(policy, path, gradient, labels, cond, self.eta, self.clip, self.lean)
                    found.append((earned, *(part.to(self.home(policy)) for part in two), share))
            path, labels, cond = joined(drawn)
            rewards, adjoints, means, shares = zip(*found, strict=True)
            clipped = sum(share * len(part) for share, part in zip(shares, rewards, strict=True)) / self.batch
            earned, adjoints, means = torch.cat(rewards), torch.cat(adjoints, dim=1), torch.cat(means, dim=1)
            del drawn, found, two  # or what is joined would be held twice
            visited = islice(visits(self.steps, self.batch, self.regressed, generator, self.mine), self.reuse)
            for used, (i, row) in enumerate(visited, start=1):
                for rows in parts(len(i), self.micro):
                    steps, mine = i[rows], row[rows]
                    here = revisit(policy, path, steps, mine, labels, cond, self.eta)
                    u = (here.mean - means[steps, mine].to(policy.device)) / here.std
                    miss = half_square(u - here.std * adjoints[steps, mine].to(policy.device))
                    figures = {"kl": self.steps * (half_square(u.detach()).sum() / seen)}
                    if last := rows.stop == len(i):
                        figures |= {"reward": self.weight * earned.mean(), "clipped": clipped}
                    yield Step(self.steps * (miss.sum() / seen), figures, last, used == self.reuse)


class AdjointSettings(LearnerSettings):
    """`learn/adjoint.py`."""

    updates: int = Field(800, ge=1)
    batch: int = Field(160, ge=1)
    lr_adapter: float = Field(1.5e-3, gt=0)
    regressed: int = Field(5, ge=1)
    reuse: int = Field(4, ge=1)
    clip: float = Field(10.0, gt=0)
    lean: bool = False
