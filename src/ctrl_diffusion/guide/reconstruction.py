"""Guide by a clean classifier at the reconstruction x̂: DPS and MPGD.

p(y | x_t) = E[p(y | x_0) | x_t] is approximated by p(y | x̂(x_t)), the mean of x_0 in place of its distribution: true
where x_0 is all but known, too confident where it is not (Chung et al. 2023, theorem 1).

    DPS     x̂_y = x̂ + w (σ_t²/α_t) ∇_{x_t} r(x̂(x_t)) = x̂ + w Cov[x_0 | x_t] ∇r(x̂)
    MPGD    x̂_y = x̂ + w c_t ∇r(x̂),   c_t = v σ_t²/(α_t² v + σ_t²)

DPS differentiates through the network. MPGD takes the classifier's gradient at x̂ alone; its c_t is free in the paper,
and here the variance of x_0 given x_t of a normal prior of variance v, for which both are the same.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..chain.denoise import loss_scale
from ..chain.schedule import per_sample
from .method import Target
from .steered import Guidance, gradient, tweedie_factor


class Lookahead(NamedTuple):
    """Hold what a method knows at x_t: x̂ (B, *), w r(x̂) (B,), and the shift of x̂ that it proposes (B, *)."""

    x_hat: Tensor
    log_tilt: Tensor
    shift: Tensor


@torch.enable_grad()
def look_ahead(target: Target, x_t: Tensor, t: Tensor | float) -> Lookahead:
    """Compute x̂, w r(x̂), and the shift of DPS, w (σ_t²/α_t) ∇_{x_t} r(x̂(x_t)), through the denoiser."""
    x_t = x_t.detach().requires_grad_()
    x_hat = target.denoiser(x_t, t, **target.cond)
    log_tilt = target.log_tilt(x_hat)
    shift = tweedie_factor(target.denoiser.schedule, t, x_t) * gradient(log_tilt, x_t, loss_scale(target.denoiser))
    return Lookahead(x_hat.detach(), log_tilt.detach(), shift)


@dataclass
class DPS(Guidance):
    """Sample by diffusion posterior sampling (Chung et al. 2023, section 3.1).

    The step size of the paper's algorithm 1 is ζ/‖y − A x̂‖, a norm that only a regression has; this is the step of its
    equations, times the strength.
    """

    def x_hat(self, target: Target, x_t: Tensor, t: Tensor | float) -> Tensor:
        x_hat, _, shift = look_ahead(target, x_t, t)
        return x_hat + shift


@dataclass
class MPGD(Guidance):
    """Sample by manifold-preserving guided diffusion without projection (He et al. 2024, algorithm 1).

    The paper keeps ε̂ of the unguided x̂ in its step, here it is that of x̂_y; the difference is a factor of the free c_t.
    """

    variance: float = 1.0  # v, of a dimension of x_0

    def x_hat(self, target: Target, x_t: Tensor, t: Tensor | float) -> Tensor:
        alpha, sigma = target.denoiser.schedule(t)
        c_t = self.variance * sigma**2 / (alpha**2 * self.variance + sigma**2)
        with torch.no_grad():
            x_hat = target.denoiser(x_t, t, **target.cond)
        with torch.enable_grad():
            x_hat = x_hat.detach().requires_grad_()
            shift = gradient(target.log_tilt(x_hat), x_hat)
        return x_hat.detach() + per_sample(c_t, x_t) * shift
