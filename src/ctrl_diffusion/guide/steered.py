"""A guided denoiser is a denoiser: `rollout` samples it, and the certificate judges it as it does a policy.

By Tweedie's formula x̂ = (x_t + σ_t² ∇ log p(x_t))/α_t, so that a likelihood of x_t moves x̂ to

    x̂_y = x̂ + w (σ_t²/α_t) ∇_{x_t} log p(y | x_t),

the denoiser of the conditional itself if p(y | x_t) is the truth and w = 1.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chain.denoise import SMALLEST_ALPHA, Denoiser
from ..chain.paths import paths
from ..chain.rollout import Times
from ..chain.schedule import Schedule, per_sample
from ..data.labels import Labels
from ..reward.reward import Reward
from .method import Asked, Earned, Method


def gradient(earned: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """∇_x of a reward (B,) row by row: (B, *); `scale` keeps it from vanishing in half precision on its way.

    Raises:
        ValueError: the reward knows nothing of x.
    """
    if not earned.requires_grad:
        raise ValueError("this reward has no gradient, which this method follows. Use particles or best of n.")
    return torch.autograd.grad(scale * earned.sum(), x)[0] / scale


def of_score(schedule: Schedule, t: Tensor | float, x: Tensor) -> Tensor:
    """σ_t²/α_t, by which a likelihood's gradient at x_t moves x̂.

    Where α_t is next to nothing so is that gradient, but for rounding and a fitted network's error, which this would
    blow up: pure noise knows nothing of y, and below the smallest α_t a prior is asked at nothing is followed.
    """
    alpha, sigma = schedule(t)
    return per_sample(torch.where(alpha < SMALLEST_ALPHA, 0.0, sigma**2 / alpha.clamp(min=SMALLEST_ALPHA)), x)


@dataclass(kw_only=True)
class Guidance(Method):
    """A method that is a denoiser around a denoiser."""

    @abstractmethod
    def x_hat(self, asked: Asked, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x̂_y (B, *) at x_t (B, *)."""

    def steered(self, denoiser: Denoiser, reward: Reward) -> "Steered":
        """The guided denoiser: `paths` samples it, and compares it with the prior for a certificate."""
        return Steered(self, denoiser, self.followed(reward))

    def sample(self, asked: Asked, times: Times, generator: torch.Generator) -> Tensor:
        guided, control = Steered(self, asked.denoiser, asked.earned), (asked.cond, asked.labels, asked.strength)
        return paths(guided, len(asked), times, generator, *control, eta=self.eta, batch=self.batch).x_0


class Steered(Denoiser):
    """A denoiser guided by labels, at a strength, as a policy is; without labels, or at strength 0, the prior.

    Args:
        guidance: by what.
        base: the denoiser.
        earned: what is followed.
    """

    def __init__(self, guidance: Guidance, base: Denoiser, earned: Earned) -> None:
        super().__init__()
        self.guidance, self.base, self.earned = guidance, base, earned
        self.schedule, self.shape, self.start = base.schedule, base.shape, base.start

    @property
    def prior(self) -> Denoiser:
        return self.base.prior

    def frozen(self) -> AbstractContextManager[None]:
        return self.base.frozen()

    def forward(
        self, x_t: Tensor, t: Tensor | float, labels: Labels | None = None, strength: float = 1.0, **cond: Tensor
    ) -> Tensor:
        if strength == 0.0 or not labels:
            return self.prior(x_t, t, **cond)
        return self.guidance.x_hat(Asked(self.base, self.earned, labels, cond, strength), x_t, t)
