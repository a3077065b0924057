"""Samplers that weigh what the prior's chain draws by the reward: many particles, the right ones kept.

All aim at the prior's own N-step chain tilted by exp(w r(x_0)), what log Z and the certificate mean by the target. With
the chain drawn from proposals q_i, and potentials G_i whose product is exp(w r(x_0)),

    weight = Π_i G_i(x_i) p_pre(x_{i+1} | x_i)/q(x_{i+1} | x_i)

is right whatever q and the G_i are, and so is resampling by the weight so far along the way.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..chain.noise import normal
from ..chain.paths import default_batch
from ..chain.rollout import Times, read_out
from ..chain.rows import parts
from ..chain.transition import half_square, step
from .method import Asked
from .reconstruction import looked_ahead
from .selection import Population, systematic


@dataclass
class Steering(Population):
    """Particles weighed at every step by what x̂ would earn, and resampled by the weight so far.

    Args:
        spread: resample where the effective share of the particles falls below it; 0 never, 1 always.

    Raises:
        ValueError: steps without noise, whose weights would divide by nothing.
    """

    spread: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.eta <= 1.0:
            raise ValueError(f"particles need noise in every step: eta must lie in (0, 1], got {self.eta}. Use 1.0.")

    @abstractmethod
    def looked(self, asked: Asked, x_t: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """x̂ (n, *), w r(x̂) (n,), and what the proposal adds to x̂ (n, *)."""

    def gain(self, earned: Tensor, most: Tensor, given: Tensor) -> Tensor:
        """log G (n,), of what x̂ earns, the most it ever did, and the sum of log G so far: here their difference."""
        return earned - given

    def population(
        self, asked: Asked, groups: list[slice], times: Times, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        denoiser, n = asked.denoiser, len(asked)
        x_t = normal((n, *denoiser.shape), denoiser, generator)
        log_w, given, most = (x_t.new_full((n,), start) for start in (0.0, 0.0, -math.inf))
        few = parts(n, self.batch or default_batch(denoiser))
        rows_by_size: dict[int, list[Tensor]] = {}
        for group in groups:
            rows_by_size.setdefault(group.stop - group.start, []).append(torch.arange(group.start, group.stop))
        blocks = [torch.stack(rows) for rows in rows_by_size.values()]  # groups of one size go together
        for t, s in pairwise(times):
            found = zip(*(self.looked(asked.rows(rows), x_t[rows], t) for rows in few), strict=True)
            x_hat, earned, toward = (torch.cat(each) for each in found)
            most = torch.maximum(most, earned)
            gain = self.gain(earned, most, given)
            log_w, given = log_w + gain, given + gain
            kept = torch.arange(n)
            for rows in blocks:
                size = rows.shape[1]
                uneven = 1 / log_w[rows].softmax(1).square().sum(1) < self.spread * size
                poor = rows[uneven.cpu()]
                kept[poor] = poor.gather(1, systematic(log_w[poor], size, generator))
                log_w[poor] = 0.0
            x_t, x_hat, toward, given, most = (each[kept] for each in (x_t, x_hat, toward, given, most))
            pre, here = (step(denoiser.schedule, x, x_t, t, s, self.eta) for x in (x_hat, x_hat + toward))
            z = normal(x_t.shape, x_t, generator)
            x_t, u = here.rsample(z), here.control(pre)
            log_w = log_w - half_square(u) - (u * z).flatten(1).sum(1)
        x_0 = torch.cat([read_out(denoiser, x_t[rows], times[-1], **asked.rows(rows).cond) for rows in few])
        return x_0, log_w + asked.rewards(x_0) - given


@dataclass
class TDS(Steering):
    """The twisted diffusion sampler (Wu et al. 2023, algorithm 1): proposals of DPS, twisted by p̂(y | x̂(x_t))."""

    def looked(self, asked: Asked, x_t: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        return looked_ahead(asked, x_t, t)


@dataclass
class FeynmanKac(Steering):
    """Feynman–Kac steering (Singhal et al. 2025, section 3): the prior's own steps, no gradients.

    Args:
        potential: "difference", exp(r(x̂_i) − r(x̂_{i−1})), or "max", exp(max_{j ≤ i} r(x̂_j)); the last makes up for the
            others.
    """

    potential: Literal["difference", "max"] = "difference"

    def looked(self, asked: Asked, x_t: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        x_hat = asked.denoiser(x_t, t, **asked.cond)
        return x_hat, asked.reward(x_hat), torch.zeros_like(x_hat)

    def gain(self, earned: Tensor, most: Tensor, given: Tensor) -> Tensor:
        return most if self.potential == "max" else super().gain(earned, most, given)
