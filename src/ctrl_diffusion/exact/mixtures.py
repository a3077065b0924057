"""Define priors and likelihoods whose everything is known: Gaussian mixtures and their tilts in closed form.

For x_0 ~ Σ_k π_k N(m_k, Σ) and x_t = α x_0 + σ ε, with V = α² Σ + σ² I,

    r_k(x_t) ∝ π_k N(x_t; α m_k, V)
    E[x_0 | x_t] = Σ_k r_k (m_k + α Σ V⁻¹ (x_t − α m_k)).

The tilt by a linear-Gaussian likelihood is again such a mixture (`posterior`), so its denoiser is known as well: the
exact control in the limit of small steps.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.schedule import Schedule, per_sample


class GaussianMixture(Denoiser):
    """Denoise with a mixture of K Gaussians of one covariance as the prior.

    Args:
        means: (K, D).
        std: of every component: a number, or (D,) along the axes; 0 gives point masses.
        schedule: any.
        weights: (K,), or (G, K) for each condition c = 0 … G − 1; uniform if None.
        axes: (D, D), orthonormal rows, the directions of `std`; the coordinates' own if None.
    """

    def __init__(
        self, means: Tensor, std: float | Tensor, schedule: Schedule, weights: Tensor | None = None,
        axes: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        components, dim = means.shape
        self.register_buffer("means", means)
        self.register_buffer("weights", means.new_full((components,), 1 / components) if weights is None else weights)
        self.register_buffer("std", torch.as_tensor(std, dtype=means.dtype).expand(dim).clone())
        self.register_buffer("axes", axes)
        self.schedule, self.shape = schedule, (dim,)

    @property
    def covariance(self) -> Tensor:
        """Σ (D, D) of every component."""
        axes = torch.eye(*2 * self.shape, dtype=self.std.dtype) if self.axes is None else self.axes
        return axes.mT @ (self.std**2).diag() @ axes

    def turned(self, x: Tensor) -> Tensor:
        """Return x (*, D) in the coordinates of the axes."""
        return x if self.axes is None else x @ self.axes.mT

    def log_weights(self, c: Tensor | None, n: int) -> Tensor:
        """Return log π of n samples (n, K), by their condition c (n,) if the weights depend on one."""
        if self.weights.ndim == 1:
            return self.weights.log().expand(n, -1)
        if c is None:
            raise ValueError(f"this mixture has {len(self.weights)} conditions: give c (B,).")
        return self.weights.log()[c]

    def _components(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return, at time t, α Σ V⁻¹ (B, D) and x_t − α m_k (B, K, D) along the axes, and log N (B, K)."""
        alpha, sigma = (per_sample(a, x).view(-1, 1).expand(len(x), 1) for a in self.schedule(t))
        variance = (alpha * self.std) ** 2 + sigma**2
        offset = self.turned(x)[:, None] - alpha[:, None] * self.turned(self.means)
        log_normal = -0.5 * (offset.square() / variance[:, None] + variance[:, None].log() + math.log(2 * math.pi))
        return alpha * self.std**2 / variance, offset, log_normal.sum(2)

    def log_components(self, x: Tensor, t: Tensor | float = 0.0, c: Tensor | None = None) -> Tensor:
        """Return log π_k N(x; α m_k, V) in nats (B, K) at x (B, D) of time t; t = 0 is clean."""
        return self.log_weights(c, len(x)) + self._components(x, t)[2]

    def forward(self, x_t: Tensor, t: Tensor | float, c: Tensor | None = None) -> Tensor:
        pull, offset, log_normal = self._components(x_t, t)
        r = (self.log_weights(c, len(x_t)) + log_normal).softmax(1)
        x_hat = (r[:, :, None] * (self.turned(self.means) + pull[:, None] * offset)).sum(1)
        return x_hat if self.axes is None else x_hat @ self.axes

    def log_density(self, x: Tensor, t: Tensor | float = 0.0, c: Tensor | None = None) -> Tensor:
        """Return log p_t(x | c) in nats (B,) at x (B, D); t = 0 is the clean mixture."""
        return self.log_components(x, t, c).logsumexp(1)

    def sample(self, n: int, generator: torch.Generator, c: Tensor | None = None) -> Tensor:
        """Draw n exact samples (n, D) of the clean mixture."""
        k = self.log_weights(c, n).exp().multinomial(1, generator=generator).squeeze(1)
        noise = self.std * torch.randn(n, *self.shape, generator=generator, dtype=self.means.dtype)
        return self.means[k] + (noise if self.axes is None else noise @ self.axes)


class ComponentLabel:
    """Label x by the component of a mixture that it came from; of a mixture with conditions this is p(y | x, c)."""

    def __init__(self, mixture: GaussianMixture, conditional: bool = False) -> None:
        self.mixture, self.classes, self.conditional = mixture, len(mixture.means), conditional

    def log_prob(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Return log p(y | x) in nats (B, K) on clean x (B, D), under c (B, *) if it is conditional."""
        return self.mixture.log_components(x, c=c).log_softmax(1)


class Logistic:
    """Label x by a soft half-space: p(y = 1 | x) = sigmoid(steepness · (direction·x − offset))."""

    classes = 2

    def __init__(self, direction: Tensor, offset: float = 0.0, steepness: float = 4.0) -> None:
        self.direction, self.offset, self.steepness = direction, offset, steepness

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(y | x) in nats (B, 2)."""
        score = self.steepness * (x @ self.direction - self.offset)
        return F.logsigmoid(torch.stack([-score, score], dim=1))


class LinearGaussian:
    """Measure y = direction·x + std · noise, a continuous y with values (K,) of interest: p(y | x) is a density."""

    def __init__(self, direction: Tensor, values: Tensor, std: float) -> None:
        self.direction, self.values, self.std, self.classes = direction, values, std, len(values)

    @property
    def bound(self) -> float:
        """The largest log-density there is."""
        return -math.log(self.std * math.sqrt(2 * math.pi))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of each value in nats (B, K)."""
        return torch.distributions.Normal((x @ self.direction)[:, None], self.std).log_prob(self.values)


def posterior(
    prior: GaussianMixture, likelihood: LinearGaussian, k: int, gamma: float = 1.0
) -> tuple[GaussianMixture, Tensor]:
    """Return the mixture p(x | c) · p(y_k | x)^γ / Z, and log Z: () or (G,) for each condition.

    With precision γ/τ² along a: Σ' = (Σ⁻¹ + γ a aᵀ/τ²)⁻¹, m' = m + Σ' a (γ/τ²)(y − a·m), weights by the evidence of y
    under each component.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}: at 0 the posterior is the prior.")
    a, y, noise = likelihood.direction, likelihood.values[k], likelihood.std**2 / gamma
    covariance = prior.covariance
    along = covariance @ a
    evidence = a @ along + noise
    variances, vectors = torch.linalg.eigh(covariance - torch.outer(along, along) / evidence)
    residual = y - prior.means @ a
    log_weights = prior.weights.log() - 0.5 * (residual**2 / evidence + evidence.log() + math.log(2 * math.pi))
    # N(y; a·x, τ²)^γ is N(y; a·x, τ²/γ) but for a constant
    constant = 0.5 * ((1 - gamma) * math.log(2 * math.pi * likelihood.std**2) - math.log(gamma))
    means = prior.means + residual[:, None] / evidence * along
    tilted = GaussianMixture(
        means, variances.clamp(min=0).sqrt(), prior.schedule, log_weights.softmax(-1), vectors.mT.contiguous()
    )
    return tilted, log_weights.logsumexp(-1) + constant
