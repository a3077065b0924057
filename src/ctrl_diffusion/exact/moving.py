"""Define a prior whose condition c is a point of R^C, and its tilts in closed form.

Given c, x_0 = A c + z with z of a Gaussian mixture whose log-weights are linear in c as well:

    π_k(c) ∝ π_k exp(b_k·c),      E[x_0 | x_t, c] = A c + E[z | z_t = x_t − α A c, c].

A linear-Gaussian likelihood leaves the family: `moving_posterior` is the exact p(x | c, y) for every c at once.
"""

import math

import torch
from torch import Tensor

from ..chain.schedule import Schedule, per_sample
from .mixtures import GaussianMixture, LinearGaussian, posterior


class MovingMixture(GaussianMixture):
    """Denoise with a mixture of K Gaussians that moves with c and is reweighted by it.

    Args:
        means: (K, D), at c = 0.
        std, axes: see `GaussianMixture`.
        schedule: any.
        move: A (D, C).
        lean: b (K, C).
        weights: π (K,), at c = 0; uniform if None.
    """

    def __init__(
        self, means: Tensor, std: float | Tensor, schedule: Schedule, move: Tensor, lean: Tensor,
        weights: Tensor | None = None, axes: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(means, std, schedule, weights, axes)
        self.register_buffer("move", move)
        self.register_buffer("lean", lean)

    def log_weights(self, c: Tensor | None, n: int) -> Tensor:
        """Return log π(c) (n, K) under conditions c (n, C)."""
        return (self.weights.log() + self._points(c) @ self.lean.mT).log_softmax(1)

    def _points(self, c: Tensor | None) -> Tensor:
        """Return c (n, C) in the prior's precision; raise ValueError for one that is no point of R^C."""
        dim = self.move.shape[1]
        if c is None or c.ndim != 2 or c.shape[1] != dim:
            shape = None if c is None else tuple(c.shape)
            raise ValueError(f"this mixture has a continuous condition: give c (B, {dim}), got {shape}.")
        return c.to(self.move)

    def _moved(self, c: Tensor | None) -> Tensor:
        """Return A c (n, D)."""
        return self._points(c) @ self.move.mT

    def _at_rest(self, x: Tensor, t: Tensor | float, c: Tensor | None) -> Tensor:
        """Return x_t − α A c (n, D)."""
        return x - per_sample(self.schedule(t)[0], x) * self._moved(c)

    def log_components(self, x: Tensor, t: Tensor | float = 0.0, c: Tensor | None = None) -> Tensor:
        return super().log_components(self._at_rest(x, t, c), t, c)

    def forward(self, x_t: Tensor, t: Tensor | float, c: Tensor | None = None) -> Tensor:
        return self._moved(c) + super().forward(self._at_rest(x_t, t, c), t, c)

    def sample(self, n: int, generator: torch.Generator, c: Tensor | None = None) -> Tensor:
        return self._moved(c) + super().sample(n, generator, c)


def moving_posterior(prior: MovingMixture, likelihood: LinearGaussian, k: int, gamma: float = 1.0) -> MovingMixture:
    """Return the mixture p(x | c) · p(y_k | x)^γ / Z(c), for every c.

    At c = 0 it is `posterior`. With the gain g = Σa/v, v = a·Σa + τ²/γ, a moved component is y − a·m_k − a·A c away
    from y, so that A' = A − g (a·A) and, of the evidence, what depends on k and c is exp((y − a·m_k) (a·A c)/v).
    """
    tilted, _ = posterior(prior, likelihood, k, gamma)
    a, y = likelihood.direction, likelihood.values[k]
    gain = prior.covariance @ a
    variance = a @ gain + likelihood.std**2 / gamma
    moved = a @ prior.move
    lean = prior.lean + torch.outer(y - prior.means @ a, moved) / variance
    move = prior.move - torch.outer(gain / variance, moved)
    return MovingMixture(tilted.means, tilted.std, prior.schedule, move, lean, tilted.weights, tilted.axes)


def moving_log_z(prior: MovingMixture, likelihood: LinearGaussian, c: Tensor, gamma: float = 1.0) -> Tensor:
    """Return log Z(c, y) = log E[p(y | x)^γ | c] in nats (n, K) under conditions c (n, C), for each value of y."""
    a, c = likelihood.direction, c.to(prior.move)
    variance = a @ prior.covariance @ a + likelihood.std**2 / gamma
    constant = 0.5 * ((1 - gamma) * math.log(2 * math.pi * likelihood.std**2) - math.log(gamma))
    place = (prior.means @ a)[:, None] - likelihood.values  # (K of the mixture, K of y)
    offset = place + (c @ prior.move.mT @ a)[:, None, None]
    evidence = -0.5 * (offset.square() / variance + variance.log() + math.log(2 * math.pi))
    return (prior.log_weights(c, len(c))[:, :, None] + evidence).logsumexp(1) + constant
