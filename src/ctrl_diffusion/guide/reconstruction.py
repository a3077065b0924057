"""Guidance by a clean classifier at the reconstruction x̂: DPS and MPGD.

p(y | x_t) = E[p(y | x_0) | x_t] is taken to be p(y | x̂(x_t)): a Gaussian's mean in the place of its average, true where
x_0 is all but known and too sure of itself where it is not (Chung et al. 2023, theorem 1).

    DPS     x̂_y = x̂ + w (σ_t²/α_t) ∇_{x_t} r(x̂(x_t)) = x̂ + w Cov[x_0 | x_t] ∇r(x̂)
    MPGD    x̂_y = x̂ + w c_t ∇r(x̂),   c_t = v σ_t²/(α_t² v + σ_t²)

DPS goes back through the network. MPGD stays at x̂ and asks for the classifier's gradient alone; its c_t is free in the
paper and here the variance of x_0 given x_t of a normal prior of variance v, for which both are the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..chain.denoise import loss_scale
from ..chain.schedule import per_sample
from .method import Asked
from .steered import Guidance, gradient, of_score


@torch.enable_grad()
def looked_ahead(asked: Asked, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ (B, *), w r(x̂) (B,), and (σ_t²/α_t) ∇_{x_t} of that, through the denoiser: (B, *)."""
    x_t = x_t.detach().requires_grad_()
    x_hat = asked.denoiser(x_t, t, **asked.cond)
    reward = asked.reward(x_hat)
    toward = of_score(asked.denoiser.schedule, t, x_t) * gradient(reward, x_t, loss_scale(asked.denoiser))
    return x_hat.detach(), reward.detach(), toward


@dataclass
class DPS(Guidance):
    """Diffusion posterior sampling (Chung et al. 2023, section 3.1).

    The paper's algorithm 1 takes ζ/‖y − A x̂‖ for the size of its step, a norm that only a regression has; this is the
    step its equations ask for, times the strength.
    """

    def x_hat(self, asked: Asked, x_t: Tensor, t: Tensor | float) -> Tensor:
        x_hat, _, toward = looked_ahead(asked, x_t, t)
        return x_hat + toward


@dataclass
class MPGD(Guidance):
    """Manifold-preserving guided diffusion without projection (He et al. 2024, algorithm 1).

    The paper keeps ε̂ of the unguided x̂ in its step, here it is that of x̂_y; the difference is a factor of the free c_t.

    Args:
        variance: v, of a dimension of x_0.
    """

    variance: float = 1.0

    def x_hat(self, asked: Asked, x_t: Tensor, t: Tensor | float) -> Tensor:
        alpha, sigma = asked.denoiser.schedule(t)
        c_t = self.variance * sigma**2 / (alpha**2 * self.variance + sigma**2)
        with torch.no_grad():
            x_hat = asked.denoiser(x_t, t, **asked.cond)
        with torch.enable_grad():
            x_hat = x_hat.detach().requires_grad_()
            toward = gradient(asked.reward(x_hat), x_hat)
        return x_hat.detach() + per_sample(c_t, x_t) * toward
