"""Measure where on the prior's way from noise to data y is decided, and choose where a control should speak.

p̂ is asked about x̂ = E[x_0 | x_t] at every step of the prior's own paths. A logistic regression on its log-probabilities
predicts the label of the path's end: what it predicts better than the label's frequency is information that x_t has
about y, I(y; x_t | c), measured from below. Where it has all but reached its last value a control has nothing left to
say; where it has not begun to rise nothing can be said yet. There the control is silent (the guidance interval of
Kynkäänniemi et al. 2024, arXiv 2404.07724, made a property of the control).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.noise import normal
from ..chain.paths import denoised
from ..chain.rollout import Times
from ..reward.outlook import features_of, predicted

DECIDED, UNDECIDED = 0.95, 0.02  # shares of the information behind and before which a control is silent
LEAST = 0.05  # nats about y, below which nothing is decided anywhere


@dataclass
class Profile:
    """Hold the information in nats that the states of a chain have about y, at least, at some of its times."""

    times: Times
    nats: list[float]
    last: float  # of the end of the path itself

    def interval(self, denoiser: Denoiser) -> tuple[float, float] | None:
        """Return σ_off and σ_on of a control: where y is neither decided nor undecidable; None for everywhere.

        σ_off is 0 where y is decided at the end of the chain only. As the figures are lower bounds, above all where
        there is much noise, σ_on is where α is half of what it is where information is first seen.
        """
        most = max(self.nats)
        if most < LEAST:
            return None
        schedule = denoiser.schedule
        begin, end = (
            next(i for i, nats in enumerate(self.nats) if nats >= share * most) for share in (UNDECIDED, DECIDED)
        )
        on = schedule.latest(float(schedule(self.times[begin])[0]) / 2)
        sigma_on = float(schedule(min(on, denoiser.start))[1])
        if end >= len(self.nats) - 1 or end == 0 or DECIDED * self.last > most:
            return (0.0, sigma_on)
        above, below = (float(schedule(self.times[i])[1]) for i in (end - 1, end))
        return ((above * below) ** 0.5, sigma_on)


@torch.no_grad()
def denoised_paths(
    prior: Denoiser, n: int, times: Times, generator: torch.Generator, cond: dict[str, Tensor]
) -> Iterator[Tensor]:
    """Yield x̂ (n, *) at every step of n paths of the prior, and last the read-out x_0."""
    noise = (normal((n, *prior.shape), prior, generator) for _ in times)
    for _, x_hat in denoised(prior, noise, times, cond):
        yield x_hat


def information(log_p: Tensor, p_end: Tensor, group: Tensor, seed: int = 0) -> float:
    """Estimate from below, in nats, what p̂ of x̂ says about the label of the path's end, beyond c.

    Args:
        log_p: (n, K), log p̂(y | x̂).
        p_end: (n, K), p̂(y | x_0) of the same paths.
        group: (n,), the number of the path's condition c.
        seed: of the labels that are drawn from p_end.
    """
    features = features_of(log_p, group)
    one_hot = torch.nn.functional.one_hot(group).double()
    frequencies = (one_hot.T @ p_end.double()) / one_hot.sum(0)[:, None]
    base = -(p_end * frequencies[group].clamp(min=1e-12).log()).sum(1)
    log_q = predicted(features, p_end, torch.Generator().manual_seed(seed))
    return max(0.0, float((base + (p_end * log_q).sum(1)).mean()))
