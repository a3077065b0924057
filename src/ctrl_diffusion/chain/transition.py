"""Take the Gaussian step of the reverse process, from which everything else follows.

One step t → s < t with churn η, given x̂ = E[x_0 | x_t] and ε̂ = (x_t − α_t x̂)/σ_t:

    std  = η (σ_s/σ_t) sqrt(σ_t² − (α_t/α_s)² σ_s²)
    mean = α_s x̂ + sqrt(σ_s² − std²) ε̂

η = 0 is DDIM (Song et al. 2021, eq. 12), η = 1 ancestral sampling (DDPM) and, for every schedule, the memoryless noise
level that makes x_0 independent of x_1 (Domingo-Enrich et al. 2025), so that tilting the path also tilts the marginal.

std is the same for prior and policy. Then with the whitened control u = (mean_g − mean_pre)/std

    KL(step)                = ½‖u‖²
    log p_g/p_pre (x_s)     = u·z + ½‖u‖²     where x_s = mean_g + std z

in nats, summed over dimensions, never averaged.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .denoise import Denoiser
from .schedule import Schedule, coefficients


class Gaussian(NamedTuple):
    """Describe a diagonal Gaussian over x (B, *) with one standard deviation per sample, () or (B, 1, …)."""

    mean: Tensor
    std: Tensor

    def rsample(self, noise: Tensor) -> Tensor:
        """Return mean + std · noise, differentiable in both."""
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density in nats, summed over dimensions: (B,)."""
        log_density: Tensor = torch.distributions.Normal(self.mean, self.std, validate_args=False).log_prob(x)
        return log_density.flatten(1).sum(1)

    def control(self, prior: "Gaussian") -> Tensor:
        """Return the whitened control u = (mean − prior.mean)/std (B, *); both must share one std."""
        return (self.mean - prior.mean) / self.std

    def kl(self, prior: "Gaussian") -> Tensor:
        """Return KL(self ‖ prior) = ½‖u‖² in nats, summed over dimensions: (B,); both must share one std."""
        return half_square(self.control(prior))


def half_square(u: Tensor) -> Tensor:
    """Return ½‖u‖² over all but the first dimension: (B,)."""
    return 0.5 * u.flatten(1).square().sum(1)


def step_std(schedule: Schedule, t: Tensor | float, s: Tensor | float, eta: float = 1.0) -> Tensor:
    """Return the standard deviation of the step t → s, float64, in the shape of t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    return eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()


def step_coefficients(schedule: Schedule, t: Tensor | float, s: Tensor | float, eta: float) -> tuple[Tensor, ...]:
    """Return a, b, std of the step t → s, whose mean is a x̂ + b x_t; float64, in the shape of t."""
    std = step_std(schedule, t, s, eta)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    rest = (sigma_s**2 - std**2).clamp(min=0).sqrt() / sigma_t  # the weight of σ_t ε̂ = x_t − α_t x̂
    return alpha_s - rest * alpha_t, rest, std


def step(schedule: Schedule, x_hat: Tensor, x_t: Tensor, t: Tensor | float, s: Tensor | float, eta: float) -> Gaussian:
    """Return the step t → s from x_t (B, *) for the denoiser's x̂ (B, *)."""
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}. Use 1.0 for ancestral sampling.")
    a, b, std = coefficients(step_coefficients, x_t, schedule, t, s, eta)
    return Gaussian(a * x_hat + b * x_t, std)


def transition(
    denoiser: Denoiser, x_t: Tensor, t: Tensor | float, s: Tensor | float, eta: float = 1.0, **cond: Any
) -> Gaussian:
    """Return p(x_s | x_t), of x_t (B, *), of a prior's or policy's reverse process.

    Times s < t are numbers or (B,), churn `eta` is in [0, 1]; `cond` are conditions, and labels for a policy.
    """
    return step(denoiser.schedule, denoiser(x_t, t, **cond), x_t, t, s, eta)
