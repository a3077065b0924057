"""Sample by many weighted particles: sequential Monte Carlo along the prior's chain.

All aim at the prior's own N-step chain tilted by exp(w r(x_0)), the target of log Z and the certificate. With the chain
drawn from proposals q_i, and potentials G_i whose product is exp(w r(x_0)),

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
from .method import Target
from .reconstruction import Lookahead, look_ahead
from .selection import Population, systematic


@dataclass
class Steering(Population):
    """Weight particles at every step by the reward of x̂, and resample them by the weight so far."""

    spread: float = 0.5  # resample where the effective share of the particles falls below it; 0 never, 1 always

    def __post_init__(self) -> None:  # without noise the weights would be divided by 0
        if not 0.0 < self.eta <= 1.0:
            raise ValueError(f"particles need noise in every step: eta must lie in (0, 1], got {self.eta}. Use 1.0.")

    @abstractmethod
    def propose(self, target: Target, x_t: Tensor, t: float) -> Lookahead:
        """Compute x̂ (n, *), w r(x̂) (n,), and the shift of x̂ in the proposal (n, *)."""

    def log_potential(self, log_tilt: Tensor, most: Tensor, sum_log_g: Tensor) -> Tensor:
        """Return log G_i (n,) from w r(x̂), its maximum so far, and Σ_{j<i} log G_j: here w r(x̂) less that sum."""
        return log_tilt - sum_log_g

    def population(
        self, target: Target, groups: list[slice], times: Times, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        denoiser, n = target.denoiser, len(target)
        x_t = normal((n, *denoiser.shape), denoiser, generator)
        log_w, sum_log_g, most = (x_t.new_full((n,), start) for start in (0.0, 0.0, -math.inf))
        batches = parts(n, self.batch or default_batch(denoiser))
        rows_by_size: dict[int, list[Tensor]] = {}
        for group in groups:
            rows_by_size.setdefault(group.stop - group.start, []).append(torch.arange(group.start, group.stop))
        blocks = [torch.stack(rows) for rows in rows_by_size.values()]  # groups of one size are resampled together
        for t, s in pairwise(times):
            proposals = [self.propose(target.rows(rows), x_t[rows], t) for rows in batches]
            x_hat, log_tilt, shift = (torch.cat(values) for values in zip(*proposals, strict=True))
            most = torch.maximum(most, log_tilt)
            log_g = self.log_potential(log_tilt, most, sum_log_g)
            log_w, sum_log_g = log_w + log_g, sum_log_g + log_g
            ancestor = torch.arange(n)
            for rows in blocks:
                size = rows.shape[1]
                uneven = 1 / log_w[rows].softmax(1).square().sum(1) < self.spread * size
                resampled = rows[uneven.cpu()]
                ancestor[resampled] = resampled.gather(1, systematic(log_w[resampled], size, generator))
                log_w[resampled] = 0.0
            x_t, x_hat, shift, sum_log_g, most = (v[ancestor] for v in (x_t, x_hat, shift, sum_log_g, most))
            p_pre, q = (step(denoiser.schedule, x, x_t, t, s, self.eta) for x in (x_hat, x_hat + shift))
            z = normal(x_t.shape, x_t, generator)
            x_t, u = q.rsample(z), q.control(p_pre)
            log_w = log_w - half_square(u) - (u * z).flatten(1).sum(1)  # log p_pre/q
        x_0 = torch.cat([read_out(denoiser, x_t[rows], times[-1], **target.rows(rows).cond) for rows in batches])
        return x_0, log_w + target.log_tilt_in_batches(x_0) - sum_log_g


@dataclass
class TDS(Steering):
    """Sample by the twisted diffusion sampler (Wu et al. 2023, algorithm 1): proposals of DPS, twisted by p̂(y | x̂)."""

    def propose(self, target: Target, x_t: Tensor, t: float) -> Lookahead:
        return look_ahead(target, x_t, t)


@dataclass
class FeynmanKac(Steering):
    """Sample by Feynman–Kac steering (Singhal et al. 2025, section 3): the prior's own steps, no gradients.

    `potential` is "difference", G_i = exp(r(x̂_i) − r(x̂_{i−1})), or "max", G_i = exp(max_{j ≤ i} r(x̂_j)), whose last
    makes up for the others.
    """

    potential: Literal["difference", "max"] = "difference"

    def propose(self, target: Target, x_t: Tensor, t: float) -> Lookahead:
        x_hat = target.denoiser(x_t, t, **target.cond)
        return Lookahead(x_hat, target.log_tilt(x_hat), torch.zeros_like(x_hat))

    def log_potential(self, log_tilt: Tensor, most: Tensor, sum_log_g: Tensor) -> Tensor:
        return most if self.potential == "max" else super().log_potential(log_tilt, most, sum_log_g)
