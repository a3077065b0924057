"""Whole samples of the prior, chosen by the reward: importance resampling, the best of n, rejection.

They ask nothing of the reward but its value, and of the prior nothing but samples. All pay in samples thrown away.
"""

from abc import abstractmethod
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..chain.rollout import Times
from ..chain.rows import equal_rows
from .method import Asked, Method


def systematic(log_w: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n rows drawn by weights (*, M) with one random number: each as often as it should be, but for less than one.

    Even weights and n = M draw every row once, in order (Kitagawa 1996). Returns (*, n).
    """
    upto = log_w.detach().cpu().double().softmax(-1).cumsum(-1)
    first = torch.rand(*upto.shape[:-1], 1, generator=generator, dtype=torch.float64)
    place = (torch.arange(n) + first) / n
    return torch.searchsorted(upto, place * upto[..., -1:], right=True).clamp(max=upto.shape[-1] - 1)


@dataclass
class Population(Method):
    """Weighted particles, one population for each (c, y) asked for; samples are drawn from it, some perhaps twice.

    Args:
        particles: for each sample.
        shared: whether the samples of one (c, y) share a population; else each is drawn from `particles` of its own,
            independent of the others and as far from the target as so few are.
    """

    particles: int = 16
    shared: bool = True

    def sample(self, asked: Asked, times: Times, generator: torch.Generator) -> Tensor:
        pairs = equal_rows(asked.labels, asked.cond) if self.shared else list(torch.arange(len(asked))[:, None])
        sizes = [self.particles * len(mine) for mine in pairs]
        ends = list(accumulate(sizes))
        groups = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        many = asked.rows(torch.cat([mine[:1].expand(size) for mine, size in zip(pairs, sizes, strict=True)]))
        x_0, log_w = self.population(many, groups, times, generator)
        drawn = [
            group.start + systematic(log_w[group], len(mine), generator)
            for mine, group in zip(pairs, groups, strict=True)
        ]
        return x_0.cpu()[torch.cat(drawn)[torch.cat(pairs).argsort()]]

    @abstractmethod
    def population(
        self, asked: Asked, groups: list[slice], times: Times, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A particle x_0 (n, *) for each row, and the log of its weight (n,) in its group, whose rows are alike."""


@dataclass
class Importance(Population):
    """Importance resampling: paths of the prior, weighed once, at the end."""

    def population(
        self, asked: Asked, groups: list[slice], times: Times, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        x_0 = self.of_prior(asked, times, generator)
        return x_0, asked.rewards(x_0)


@dataclass
class BestOf(Method):
    """The best of n samples of the prior by the reward: no tilt by p̂^γ, but a maximum (n = 1 is the prior).

    Args:
        n: samples to choose from.
    """

    n: int = 16

    def sample(self, asked: Asked, times: Times, generator: torch.Generator) -> Tensor:
        tried = asked.rows(torch.arange(len(asked)).repeat_interleave(self.n))
        x_0 = self.of_prior(tried, times, generator)
        best = tried.rewards(x_0).view(-1, self.n).argmax(1).cpu()
        return x_0[torch.arange(len(asked)) * self.n + best]


@dataclass
class Rejection(Method):
    """Samples of the prior until one is accepted, with probability exp(w (r − bound)): exact, at a price in tries.

    Args:
        bound: the largest reward there is; 0 for probabilities of classes. A density of y may exceed 1.
        tries: for one sample, at most.

    Raises:
        ValueError: a reward above the bound, or tries that did not do.
    """

    bound: float = 0.0
    tries: int = 1000

    def sample(self, asked: Asked, times: Times, generator: torch.Generator) -> Tensor:
        waiting, row, kept = torch.arange(len(asked)), [], []
        for _ in range(self.tries):
            mine = asked.rows(waiting)
            x_0 = self.of_prior(mine, times, generator)
            log_p = mine.rewards(x_0).cpu() - asked.strength * self.bound
            if (log_p > 0).any():
                raise ValueError(f"rejection: a reward lies above the bound {self.bound} it was told. Raise it.")
            accepted = torch.rand(len(waiting), generator=generator).log() < log_p
            row.append(waiting[accepted])
            kept.append(x_0[accepted])
            waiting = waiting[~accepted]
            if not len(waiting):
                return torch.cat(kept)[torch.cat(row).argsort()]
        raise ValueError(f"rejection: {len(waiting)} of {len(asked)} samples were not accepted in {self.tries} tries.")
