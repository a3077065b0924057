"""Optimise the policy proximally (PPO): a policy gradient on transitions that needs no gradient of the reward.

Roll out the policy without a graph. With δ_j = log p_g/p_pre of step j along a path,

    G_i = r(x_0) − Σ_{j ≥ i} δ_j

has the policy's value-to-go V_i(x_i) as its mean given x_i, and E[G_i ∇ log p_g(x_{i+1} | x_i)] is the gradient of J in
step i, the KL of the step included. The clipped surrogate (Schulman et al. 2017, eq. 7) takes several updates from the
same paths,

    min( ρ A_i, clip(ρ, 1 − ε, 1 + ε) A_i ),      ρ = p_g/p_old (x_{i+1} | x_i),      A_i = G_i − b_i(c, y).

The baseline b_i(c, y) is a running mean of G_i over paths of the pair: pairs of unlike log Z would drown each other. Of
several γ each has its own.
As G_i counts the log-ratios of the samples and not their means, it is the same on every path from x_i once the policy
is optimal, in the limit of small steps: the noise vanishes as the policy improves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from ..chain.rollout import Trajectory
from ..chain.transition import half_square
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..reward.reward import Reward
from ..system import ranks
from .on_policy import Revisiting, Rollout, revisit
from .step import Carried, Evaluations, LearnerSettings, Step, steps_to_learn


def rewards_to_go(path: Trajectory, rewards: Tensor) -> Tensor:
    """Return G (N, B): the rewards (B,) less the log-ratios of this step and those after it."""
    assert path.log_ratio is not None  # `roll_out` compares
    return rewards - path.log_ratio.flip(0).cumsum(0).flip(0)


def surrogate(log_rho: Tensor, a: Tensor, clip: float) -> Tensor:
    """Return min(ρ a, clip(ρ, 1 − ε, 1 + ε) a) (n,): beyond 1 ± ε a ratio that helps the advantage gains nothing."""
    rho = log_rho.exp()
    return torch.minimum(rho * a, rho.clamp(1 - clip, 1 + clip) * a)


@dataclass
class Baseline:
    """Keep running means (N, pairs) of G over rollouts, for each step and pair."""

    momentum: float = 0.9
    mean: Tensor | None = None

    def advantages(self, g: Tensor, pair: Tensor, pairs: int) -> Tensor:
        """Return G − b (N, B) for paths of pairs (B,), with the means before them where there are; update the means."""
        pair = pair.to(g.device)
        count = torch.bincount(pair, minlength=pairs)
        mean = g.new_zeros(len(g), pairs).index_add_(1, pair, g) / count.clamp(min=1)
        if self.mean is None:
            self.mean = torch.full_like(mean, float("nan"))
        baseline = torch.where(self.mean.isnan(), mean, self.mean)
        usable = (count > 0) & mean.isfinite()  # one mean that is not finite would never leave the average
        self.mean = torch.where(usable, self.momentum * baseline + (1 - self.momentum) * mean, self.mean)
        return g - baseline[:, pair]


class PPO(Revisiting):
    """Learn by proximal policy optimisation; arguments as of `Revisiting`."""

    class Settings(LearnerSettings):
        """Hold the settings of `PPO`.

        Args:
            surrogates: steps of each path that one update learns from. Cost: its time and memory in proportion.
            reuse: updates from one rollout. Saves time; the paths grow older.
            clip: ε; probability ratios beyond 1 ± ε gain nothing.
        """

        kept_states: ClassVar[int] = 2  # states and noise
        updates: int = Field(800, ge=1)
        batch: int = Field(160, ge=1)
        lr_adapter: float = Field(5e-4, gt=0)
        surrogates: int = Field(5, ge=1)
        reuse: int = Field(8, ge=1)
        clip: float = Field(0.2, gt=0, lt=1)

        def rows_kept(self, micro: int | None) -> int:
            transitions = self.batch * self.surrogates
            return min(transitions, micro or transitions)

        def evaluations(self, steps: int) -> Evaluations:
            return Evaluations(math.ceil(2 * steps / self.reuse), self.surrogates)

    settings: Settings

    def __call__(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator, carried: Carried = None
    ) -> Iterator[Step]:
        carried, settings = [] if carried is None else carried, self.settings
        steps, transitions = steps_to_learn(policy, self.times), settings.surrogates * self.batch  # on all ranks
        baseline = Baseline(mean=carried[0] if carried else None)
        while True:
            rollout, rewards = self.roll_out(policy, reward, conditions, generator)
            path, g = rollout.path, ranks.all_gather(rewards_to_go(rollout.path, rewards), dim=1)
            cell = ranks.all_gather(conditions.cell(rollout.pair, **rollout.gamma))
            advantage = baseline.advantages(g, cell, conditions.cells)[:, self.rows]
            carried[:] = [] if baseline.mean is None else [baseline.mean]
            for visit in self.visits(steps, settings.surrogates, generator):
                at, after = (visit.step, visit.row), (visit.step + 1, visit.row)
                step = revisit(policy, rollout, visit, self.eta)
                noise = (path.x[after].to(policy.device) - step.mean) / step.std
                log_rho = half_square(path.z[at].to(policy.device)) - half_square(noise)
                gain = surrogate(log_rho, advantage[at], settings.clip).sum()
                beyond = (log_rho.detach().exp() - 1).abs() > settings.clip
                metrics: dict[str, float | Tensor] = {"clipped": beyond.float().sum() / transitions}
                if visit.last and path.kl is not None:
                    metrics["reward"] = self.weight * rewards.mean()
                    metrics["kl"] = self.weight * path.kl.sum(0).mean()
                yield Step(-len(steps) * (gain / transitions), metrics, visit.last, visit.whole)

    @torch.no_grad()
    def roll_out(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator
    ) -> tuple[Rollout, Tensor]:
        """Draw new paths; return them with their rewards (B,), and free the parts they were drawn in."""
        with policy.frozen():
            batches = list(self.fresh_paths(policy, conditions, generator, compare=True))
            rewards = torch.cat([reward(b.path.end, b.labels, b.cond, **b.gamma) for b in batches])
        return Rollout.from_parts(batches), rewards
