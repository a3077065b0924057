"""Wrap a denoiser in guidance: a guided denoiser is a denoiser, sampled by `rollout` and certified as a policy is.

By Tweedie's formula x̂ = (x_t + σ_t² ∇ log p(x_t))/α_t, so that a likelihood of x_t moves x̂ to

    x̂_y = x̂ + w (σ_t²/α_t) ∇_{x_t} log p(y | x_t),

the denoiser of the conditional itself if p(y | x_t) is the truth and w = 1.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chain.denoise import SMALLEST_ALPHA, Denoiser
from ..chain.paths import paths
from ..chain.rollout import Times
from ..chain.schedule import Schedule, per_sample
from ..data.labels import Labels
from ..reward.reward import Reward
from .method import Method, RewardFunction, Target


def gradient(reward: Tensor, x: Tensor, loss_scale: float = 1.0) -> Tensor:
    """Return ∇_x (B, *) of a reward (B,), row by row; raise ValueError if the reward has no gradient."""
    if not reward.requires_grad:
        raise ValueError("this reward has no gradient, which this method follows. Use particles or best of n.")
    return torch.autograd.grad(loss_scale * reward.sum(), x)[0] / loss_scale


def tweedie_factor(schedule: Schedule, t: Tensor | float, x: Tensor) -> Tensor:
    """Return σ_t²/α_t, the factor of ∇_{x_t} log p(y | x_t) in x̂_y, and 0 below the smallest α_t of a prior.

    Pure noise knows nothing of y. The true gradient vanishes with α_t, but rounding and a fitted network's error do
    not, and this factor would blow them up.
    """
    alpha, sigma = schedule(t)
    return per_sample(torch.where(alpha < SMALLEST_ALPHA, 0.0, sigma**2 / alpha.clamp(min=SMALLEST_ALPHA)), x)


@dataclass(kw_only=True)
class Guidance(Method):
    """Sample by guiding a denoiser at every step."""

    @abstractmethod
    def x_hat(self, target: Target, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return x̂_y (B, *) at x_t (B, *)."""

    def steered(self, denoiser: Denoiser, reward: Reward) -> "Steered":
        """Return the guided denoiser, which `paths` samples and compares with the prior for a certificate."""
        return Steered(self, denoiser, self.guiding_reward(reward))

    def sample(self, target: Target, times: Times, generator: torch.Generator) -> Tensor:
        guided, control = Steered(self, target.denoiser, target.reward), (target.cond, target.labels, target.strength)
        return paths(guided, len(target), times, generator, *control, eta=self.eta, batch=self.batch).x_0


class Steered(Denoiser):
    """Guide a denoiser by labels at a strength, as a policy is called; without labels, or at strength 0, the prior."""

    def __init__(self, guidance: Guidance, base: Denoiser, reward: RewardFunction) -> None:
        super().__init__()
        self.guidance, self.base, self.reward = guidance, base, reward
        self.schedule, self.shape, self.start = base.schedule, base.shape, base.start

    @property
    def prior(self) -> Denoiser:
        return self.base.prior

    @contextmanager
    def frozen(self) -> Iterator[None]:
        with self.base.frozen():
            yield

    def forward(
        self, x_t: Tensor, t: Tensor | float, labels: Labels | None = None, strength: float = 1.0, **cond: Tensor
    ) -> Tensor:
        if strength == 0.0 or not labels:
            return self.prior(x_t, t, **cond)
        return self.guidance.x_hat(Target(self.base, self.reward, labels, cond, strength), x_t, t)
