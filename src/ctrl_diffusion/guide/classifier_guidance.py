"""Guidance by a classifier of noisy states (Dhariwal & Nichol 2021, algorithm 2).

    x̂_y = x̂ + w γ (σ_t²/α_t) ∇_{x_t} log p̂(y | x_t, t)

Algorithm 2 moves ε̂ by −σ_t ∇ log p̂, which is this; algorithm 1 moves the mean by std² ∇ log p̂, the same to first order
in the step. γ is the classifier's scale of the paper, which is no tilt by p̂(y | x_0)^γ unless γ = 1.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..data.labels import Labels
from ..reward.reward import Reward
from .method import Asked, Cond, Earned
from .steered import Guidance, gradient, of_score


class NoisyLikelihood(Protocol):
    """p(y | x_t, t) of one control; with an attribute `conditional` that is true, given the conditions too."""

    def log_prob(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """log p(y | x_t, t) in nats (B, K) at x_t (B, *), with a gradient."""
        ...


class At:
    """A noise-aware likelihood at one time: what a `Reward` takes."""

    def __init__(self, likelihood: NoisyLikelihood, t: Tensor | float) -> None:
        self.conditional = getattr(likelihood, "conditional", False)
        self.log_prob = partial(likelihood.log_prob, t=t)
        if hasattr(likelihood, "log_prob_at"):
            self.log_prob_at = partial(likelihood.log_prob_at, t=t)


@dataclass
class ClassifierGuidance(Guidance):
    """The sampler.

    Args:
        classifiers: p(y | x_t, t) of each control; their logarithms add.
    """

    classifiers: dict[str, NoisyLikelihood]

    def followed(self, reward: Reward) -> Earned:
        """γ Σ log p(y | x_t, t), with γ of the reward."""

        def earned(x_t: Tensor, labels: Labels, cond: Cond, t: Tensor | float) -> Tensor:
            now = {name: At(likelihood, t) for name, likelihood in self.classifiers.items()}
            return Reward(now, reward.gamma)(x_t, labels, cond)

        return earned

    def x_hat(self, asked: Asked, x_t: Tensor, t: Tensor | float) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            toward = of_score(asked.denoiser.schedule, t, x) * gradient(asked.reward(x, t), x)
        return asked.denoiser(x_t, t, **asked.cond) + toward
