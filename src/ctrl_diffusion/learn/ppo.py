"""Proximal policy optimisation: a policy gradient on transitions that needs no gradient of the reward.

Roll out the policy without a graph. With δ_j = log p_g/p_pre of step j along a path,

    G_i = r(x_0) − Σ_{j ≥ i} δ_j

has the policy's value-to-go V_i(x_i) as its mean given x_i, and E[G_i ∇ log p_g(x_{i+1} | x_i)] is the gradient of J in
step i, the KL of the step included. The clipped surrogate (Schulman et al. 2017, eq. 7) takes several updates from the
same paths,

    min( ρ A_i, clip(ρ, 1 − ε, 1 + ε) A_i ),      ρ = p_g/p_old (x_{i+1} | x_i),      A_i = G_i − b_i(c, y).

The baseline b_i(c, y) is a running mean of G_i over paths of the pair: pairs of unlike log Z would drown each other.
As G_i counts what was sampled and not its mean, it is the same on every path from x_i once the policy is optimal, in
the limit of small steps: the noise goes as the policy comes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from pydantic import Field
from torch import Tensor

from ..chain.rollout import Trajectory
from ..chain.rows import parts
from ..chain.transition import half_square
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..reward.reward import Reward
from ..system import ranks
from .on_policy import OnPolicy, joined, revisit, visits
from .step import Carried, LearnerSettings, Step


def rewards_to_go(path: Trajectory, earned: Tensor) -> Tensor:
    """G (N, B): the reward (B,) less the log-ratios of this step and those after it."""
    return earned - path.log_ratio.flip(0).cumsum(0).flip(0)


def surrogate(log_rho: Tensor, a: Tensor, clip: float) -> Tensor:
    """min(ρ a, clip(ρ, 1 − ε, 1 + ε) a) (n,): beyond 1 ± ε a ratio that helps the advantage earns no more."""
    rho = log_rho.exp()
    return torch.minimum(rho * a, rho.clamp(1 - clip, 1 + clip) * a)


class Baseline:
    """Running means of G for each step and pair.

    Args:
        momentum: of the average over rollouts.
        mean: so far (N, pairs), None if there is none.
    """

    def __init__(self, momentum: float = 0.9, mean: Tensor | None = None) -> None:
        self.momentum, self.mean = momentum, mean

    def advantages(self, g: Tensor, pair: Tensor, pairs: int) -> Tensor:
        """G − b (N, B) for paths of pairs (B,), by the mean before these paths; then takes them in.

        A pair not met before is given these paths' own mean; a mean that is not finite is not taken in.
        """
        pair = pair.to(g.device)
        count = torch.bincount(pair, minlength=pairs)
        mean = g.new_zeros(len(g), pairs).index_add_(1, pair, g) / count.clamp(min=1)
        if self.mean is None:
            self.mean = torch.full_like(mean, float("nan"))
        known = torch.where(self.mean.isnan(), mean, self.mean)
        taken = (count > 0) & mean.isfinite()
        self.mean = torch.where(taken, self.momentum * known + (1 - self.momentum) * mean, self.mean)
        return g - known[:, pair]


@dataclass
class PPO(OnPolicy):
    """The learner.

    Args:
        times, batch, eta, micro, offload: see `OnPolicy`.
        surrogates: steps of each path that one update looks at.
        reuse: updates from one rollout.
        clip: ε; ratios beyond 1 ± ε earn no more.
    """

    batch: int = 160
    surrogates: int = 5
    reuse: int = 8
    clip: float = 0.2

    def __call__(
        self,
        policy: Policy,
        reward: Reward,
        conditions: Conditions,
        generator: torch.Generator,
        carried: Carried = None,
    ) -> Iterator[Step]:
        """Losses without end."""
        carried = [] if carried is None else carried
        seen = self.surrogates * self.batch  # transitions an update, by all ranks
        baseline = Baseline(mean=carried[0] if carried else None)
        while True:
            with torch.no_grad(), policy.frozen():
                drawn = list(self.fresh_paths(policy, conditions, generator, compare=True))
                earned = torch.cat([reward(path.x_0, labels, cond) for path, _, labels, cond in drawn])
            path, labels, cond = joined(drawn)
            pair = torch.cat([pair for _, pair, _, _ in drawn])
            del drawn  # or what is joined would be held twice
            g = ranks.all_gather(rewards_to_go(path, earned), dim=1)
            advantage = baseline.advantages(g, ranks.all_gather(pair), conditions.pairs)[:, self.mine]
            carried[:] = [baseline.mean]
            visited = islice(visits(self.steps, self.batch, self.surrogates, generator, self.mine), self.reuse)
            for used, (i, row) in enumerate(visited, start=1):
                for rows in parts(len(i), self.micro):
                    steps, mine = i[rows], row[rows]
                    here = revisit(policy, path, steps, mine, labels, cond, self.eta)
                    miss = (path.x[steps + 1, mine].to(policy.device) - here.mean) / here.std
                    log_rho = half_square(path.z[steps, mine].to(policy.device)) - half_square(miss)
                    gain = surrogate(log_rho, advantage[steps, mine], self.clip)
                    beyond = (log_rho.detach().exp() - 1).abs() > self.clip
                    figures = {"clipped": beyond.float().sum() / seen}
                    if last := rows.stop == len(i):
                        kl = self.weight * path.kl.sum(0).mean()
                        figures |= {"reward": self.weight * earned.mean(), "kl": kl}
                    yield Step(-self.steps * (gain.sum() / seen), figures, last, used == self.reuse)


class PPOSettings(LearnerSettings):
    """`learn/ppo.py`."""

    updates: int = Field(800, ge=1)
    batch: int = Field(160, ge=1)
    lr_adapter: float = Field(5e-4, gt=0)
    surrogates: int = Field(5, ge=1)
    reuse: int = Field(8, ge=1)
    clip: float = Field(0.2, gt=0, lt=1)
