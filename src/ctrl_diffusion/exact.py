"""Priors whose everything is known: Gaussian mixtures under any schedule, with their exact denoiser.

For x_0 ~ Σ_k π_k N(m_k, s² I) and x_t = α x_0 + σ ε, with v = α² s² + σ²,

    r_k(x_t) ∝ π_k N(x_t; α m_k, v I)
    E[x_0 | x_t] = Σ_k r_k (m_k + (α s²/v) (x_t − α m_k)).
"""

import torch
from torch import Tensor

from .denoise import Denoiser
from .schedule import Schedule, per_sample


class GaussianMixture(Denoiser):
    """A mixture of isotropic Gaussians as a prior.

    Args:
        means: (K, D).
        std: s, of every component; 0 gives point masses.
        schedule: any.
        weights: (K,), uniform if None.
    """

    def __init__(self, means: Tensor, std: float, schedule: Schedule, weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("weights", torch.full_like(means[:, 0], 1 / len(means)) if weights is None else weights)
        self.std, self.schedule, self.shape = std, schedule, (means.shape[1],)

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        alpha, sigma = (per_sample(a, x_t) for a in self.schedule(t))
        variance = alpha**2 * self.std**2 + sigma**2
        offset = x_t[:, None] - alpha.unsqueeze(-1) * self.means  # (B, K, D)
        log_r = self.weights.log() - offset.square().sum(2) / (2 * variance)
        pull = (alpha * self.std**2 / variance).unsqueeze(-1)
        return (log_r.softmax(1)[:, :, None] * (self.means + pull * offset)).sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(component | x) in nats (B, K) on clean x (B, D): the exact classifier of the component."""
        distance = (x[:, None] - self.means).square().sum(2)
        return (self.weights.log() - distance / (2 * self.std**2)).log_softmax(1)
