"""Match adjoints: regress the control on the gradient of its own value-to-go (Domingo-Enrich et al. 2025).

With V_i the value-to-go of the policy along a path that was rolled out without a graph, the noise z held fixed,

    V_i(x_i) = V_{i+1}(mean_g(x_i) + std_i z_i) − ½‖u_i(x_i)‖² − u_i(x_i)·z_i,      V_N(x_N) = r(x_0(x_N)),

the adjoint a_i = ∇V_i is carried back by one vector-Jacobian product a step, and the whitened control is regressed on
it, ½‖u_i − std_i a_{i+1}‖², at a few steps of each path. On fresh paths the gradient of this loss is that of −J, step
by step, without a graph through the rollout; and at the optimum u_i = std_i E[a_{i+1}] holds for any number of steps.

The martingale term u·z changes no expectation but removes the noise: for the optimal control V_i is the same on every
path from x_i in the limit of small steps, and so is its gradient (sticking the landing, Roeder et al. 2017).

The *lean* adjoint of the paper drops all terms in u, a_i = (∂mean_pre,i/∂x_i)ᵀ a_{i+1}: half the cost of a rollout, the
optimum only in the limit of small steps, and several times the variance when p̂ is steep (docs/why/lab-notes.md).

Adjoints are heavy-tailed: each is clipped per sample and step, else a few paths would dominate the update.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor

from ..chain.rollout import Trajectory, read_out
from ..chain.transition import half_square, transition
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..data.labels import Labels
from ..reward.reward import Reward
from .on_policy import Revisiting, Rollout, check_gradient, clip_rows, gradient_at, revisit
from .step import Carried, Evaluations, LearnerSettings, Step, steps_to_learn


def reward_gradient(
    policy: Policy, path: Trajectory, reward: Reward, labels: Labels, cond: dict[str, Tensor], **gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rewards (B,) of a path's ends and their gradients at the last state (B, *), through the read-out."""
    with torch.enable_grad():
        x_end = path.x[-1].detach().to(policy.device).requires_grad_()
        rewards = reward(read_out(policy, x_end, path.times[-1], **cond), labels, cond, **gamma)
        check_gradient(rewards)
        gradient = gradient_at(policy, rewards.sum(), x_end)
    return rewards.detach(), gradient


class Adjoints(NamedTuple):
    """Hold the adjoints a_{i+1} (n, B, *) and the prior's means (n, B, *) of a path's last n steps i."""

    adjoints: Tensor
    means: Tensor
    clipped: float  # the share of the adjoints that were clipped


def adjoints_of(
    policy: Policy, path: Trajectory, reward_gradient: Tensor, labels: Labels, cond: dict[str, Tensor],
    eta: float = 1.0, clip: float = float("inf"), lean: bool = False, first: int = 0, **gamma: Any,
) -> Adjoints:  # fmt: skip
    """Carry a_N (B, *), the reward's gradient at the last state, back along a path of the policy to step `first`.

    `clip` bounds the norm of std_i a_{i+1}; `lean` goes back through the prior's chain only, without the terms in u,
    which are zero at a step where no control speaks.
    """
    a, adjoints, means, longer = reward_gradient, [], [], []

    def back(i: int) -> Tensor | None:
        """Return the adjoint one step earlier; the graph that float16 keeps for a second try ends with the call."""
        t, s = path.times[i], path.times[i + 1]
        x_t = path.x[i].detach().to(policy.device).requires_grad_(i > first)
        pre = transition(policy.prior, x_t, t, s, eta, **cond)
        means.append(pre.mean.detach())
        clipped, long = clip_rows(a, clip / pre.std)
        adjoints.append(clipped)
        longer.append(long.float().mean())  # read at the end, so that an accelerator need not be waited for
        if i == first:
            return None
        if lean or not policy.speaks(t, labels=labels):
            return gradient_at(policy, (pre.mean * clipped).sum(), x_t)
        step = transition(policy, x_t, t, s, eta, labels=labels, **gamma, **cond)
        u = step.control(pre)
        value = (step.mean * clipped).sum() - half_square(u).sum() - (u * path.z[i].to(u.device)).sum()
        return gradient_at(policy, value, x_t)

    for i in reversed(range(first, len(path.times) - 1)):
        with torch.set_grad_enabled(i > first):  # the adjoint before the first step is not needed
            earlier = back(i)
        if earlier is not None:
            a = earlier
    share = sum(torch.stack(longer).cpu().tolist()) / len(longer)
    return Adjoints(torch.stack(adjoints[::-1]), torch.stack(means[::-1]), share)


class Adjoint(Revisiting):
    """Learn by adjoint matching; arguments as of `Revisiting`, adjoints and means are kept with the paths."""

    class Settings(LearnerSettings):
        """Hold the settings of `Adjoint`.

        Args:
            regressed: steps of each path that one update regresses. Cost: its time and memory in proportion.
            reuse: updates from one rollout. Saves time; the paths grow older.
            clip: largest norm of std_i a_{i+1}, the control that one sample may demand of a step.
            lean: carry the adjoint back through the prior's chain only. Saves half of that; exact in the limit of small
                steps alone.
        """

        kept_states: ClassVar[int] = 4  # states and noise; adjoints and the prior's means
        updates: int = Field(800, ge=1)
        batch: int = Field(160, ge=1)
        lr_adapter: float = Field(1.5e-3, gt=0)
        regressed: int = Field(5, ge=1)
        reuse: int = Field(4, ge=1)
        clip: float = Field(10.0, gt=0)
        lean: bool = False

        def rows_kept(self, micro: int | None) -> int:
            # regressed steps of the policy; or one step of prior and policy, as the adjoint is carried back
            regressed = self.batch * self.regressed
            return max(min(regressed, micro or regressed), 2 * super().rows_kept(micro))

        def evaluations(self, steps: int) -> Evaluations:
            # rollout and adjoints serve several updates; these go through the prior, and unless lean the policy
            adjoints = steps if self.lean else 2 * steps
            return Evaluations(math.ceil(steps / self.reuse), math.ceil(adjoints / self.reuse) + self.regressed)

    settings: Settings
    differentiates = True

    def __call__(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator, carried: Carried = None
    ) -> Iterator[Step]:
        steps, transitions = steps_to_learn(policy, self.times), self.settings.regressed * self.batch  # on all ranks
        first = int(steps[0])
        while True:
            rollout, rewards, (adjoints, means, clipped) = self.roll_out(policy, reward, conditions, generator, first)
            for visit in self.visits(steps, self.settings.regressed, generator):
                at = visit.step - first, visit.row
                step = revisit(policy, rollout, visit, self.eta)
                u = (step.mean - means[at].to(policy.device)) / step.std
                loss = half_square(u - step.std * adjoints[at].to(policy.device)).sum()
                metrics: dict[str, float | Tensor] = {"kl": len(steps) * (half_square(u.detach()).sum() / transitions)}
                if visit.last:
                    metrics |= {"reward": self.weight * rewards.mean(), "clipped": clipped}
                yield Step(len(steps) * (loss / transitions), metrics, visit.last, visit.whole)

    def roll_out(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator, first: int
    ) -> tuple[Rollout, Tensor, Adjoints]:
        """Draw new paths; return them with their rewards (B,) and adjoints, and free the parts they were drawn in."""
        device, settings = self.storage(policy), self.settings
        rewards, adjoints, means, clipped = [], [], [], 0.0
        with policy.frozen():
            with torch.no_grad():
                batches = list(self.fresh_paths(policy, conditions, generator, read=False))  # read out below
            for path, _, labels, cond, gamma in batches:
                r, gradient = reward_gradient(policy, path, reward, labels, cond, **gamma)
                result = adjoints_of(
                    policy, path, gradient, labels, cond, self.eta, settings.clip, settings.lean, first, **gamma
                )
                rewards.append(r)
                adjoints.append(result.adjoints.to(device))
                means.append(result.means.to(device))
                clipped += result.clipped * len(r)
        joined = Adjoints(torch.cat(adjoints, dim=1), torch.cat(means, dim=1), clipped / self.batch)
        return Rollout.from_parts(batches), torch.cat(rewards), joined
