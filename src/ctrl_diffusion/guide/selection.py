"""Choose whole samples of the prior by the reward, without gradients; all pay in samples thrown away."""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..chain.rollout import Times
from ..chain.rows import equal_rows
from .method import Method, Target

ROUNDING = 1e-4  # nats by which single precision may lift a reward above its bound


def systematic(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n rows (*, n) by weights (*, M) with systematic resampling (Kitagawa 1996): one random number for all.

    Each row is drawn within one time of n times its weight. Even weights and n = M draw every row once, in order.
    """
    cumulative = log_w.detach().cpu().double().softmax(-1).cumsum(-1)
    u = torch.rand(*cumulative.shape[:-1], 1, generator=generator, dtype=torch.float64)
    points = (torch.arange(n) + u) / n
    return torch.searchsorted(cumulative, points * cumulative[..., -1:], right=True).clamp(max=cumulative.shape[-1] - 1)


@dataclass
class Population(Method):
    """Sample from weighted particles, one population for each (c, y); a particle may be drawn several times.

    Unless `shared`, each sample has a population of its own: independent, and as far from the target as so few are.
    """

    particles: int = 16  # for each sample
    shared: bool = True

    def sample(self, target: Target, times: Times, generator: torch.Generator) -> Tensor:
        pairs = equal_rows(target.labels, target.cond) if self.shared else list(torch.arange(len(target))[:, None])
        sizes = [self.particles * len(rows) for rows in pairs]
        groups = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        particles = target.rows(torch.cat([rows[:1].expand(size) for rows, size in zip(pairs, sizes, strict=True)]))
        x_0, log_w = self.population(particles, groups, times, generator)
        members = zip(groups, map(len, pairs), strict=True)
        chosen = torch.cat([group.start + systematic(log_w[group], n, generator) for group, n in members])
        return x_0.cpu()[chosen[torch.cat(pairs).argsort()]]

    @abstractmethod
    def population(
        self, target: Target, groups: list[slice], times: Times, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw a particle x_0 (n, *) for each row, with the log of its weight (n,) within its group of equal rows."""


@dataclass
class Importance(Population):
    """Sample by importance resampling: paths of the prior, weighted once, at the end."""

    def population(
        self, target: Target, groups: list[slice], times: Times, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        x_0 = self.sample_prior(target, times, generator)
        return x_0, target.log_tilt_in_batches(x_0)


@dataclass
class BestOf(Method):
    """Keep the sample of the largest reward among n of the prior: a maximum, not the tilt by p̂^γ."""

    n: int = 16  # samples to choose from; 1 is the prior

    def sample(self, target: Target, times: Times, generator: torch.Generator) -> Tensor:
        candidates = target.rows(torch.arange(len(target)).repeat_interleave(self.n))
        x_0 = self.sample_prior(candidates, times, generator)
        best = candidates.log_tilt_in_batches(x_0).view(-1, self.n).argmax(1).cpu()
        return x_0[torch.arange(len(target)) * self.n + best]


@dataclass
class Rejection(Method):
    """Draw from the prior until a sample is accepted, with probability exp(w (r − bound)): exact.

    It takes exp(w bound)/Z tries.

    Raises:
        ValueError: a reward above the bound, or a sample that was not accepted in so many tries.
    """

    bound: float | None = None  # the largest reward there is; None for what the reward says, `Reward.bound`
    tries: int = 1000  # for one sample, at most

    def sample(self, target: Target, times: Times, generator: torch.Generator) -> Tensor:
        pending, rows, accepted = torch.arange(len(target)), [], []
        bound = target.bound() if self.bound is None else self.bound
        for _ in range(self.tries):
            candidates = target.rows(pending)
            x_0 = self.sample_prior(candidates, times, generator)
            log_p = candidates.log_tilt_in_batches(x_0).cpu() - target.strength * bound
            if (log_p > target.strength * ROUNDING).any():
                raise ValueError(f"rejection: a reward lies above the bound {bound:g}. Raise the bound.")
            accept = torch.rand(len(pending), generator=generator).log() < log_p
            rows.append(pending[accept])
            accepted.append(x_0[accept])
            pending = pending[~accept]
            if not len(pending):
                return torch.cat(accepted)[torch.cat(rows).argsort()]
        raise ValueError(f"rejection: {len(pending)} of {len(target)} samples were not accepted in {self.tries} tries.")
