"""Guide by a classifier of noisy states (Dhariwal & Nichol 2021, algorithm 2).

    x̂_y = x̂ + w γ (σ_t²/α_t) ∇_{x_t} log p̂(y | x_t, t)

Algorithm 2 moves ε̂ by −σ_t ∇ log p̂, which is the same; algorithm 1 moves the mean by std² ∇ log p̂, the same to first
order in the step. γ is the classifier's scale of the paper, which is no tilt by p̂(y | x_0)^γ unless γ = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..data.labels import Labels
from ..reward.reward import Reward
from .method import Cond, RewardFunction, Target
from .steered import Guidance, gradient, tweedie_factor


class NoisyLikelihood(Protocol):
    """Define p(y | x_t, t) of one control; if its attribute `conditional` is true, the conditions are passed too."""

    def log_prob(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return log p(y | x_t, t) in nats (B, K) at x_t (B, *), with a gradient."""


class At:
    """Fix the time of a noise-aware likelihood, which makes it the likelihood of a `Reward`."""

    def __init__(self, likelihood: NoisyLikelihood, t: Tensor | float) -> None:
        self.conditional = getattr(likelihood, "conditional", False)
        self.log_prob: Callable[..., Tensor] = partial(likelihood.log_prob, t=t)
        if hasattr(likelihood, "log_prob_at"):
            self.log_prob_at = partial(likelihood.log_prob_at, t=t)


@dataclass
class ClassifierGuidance(Guidance):
    """Sample by classifier guidance, with γ Σ log p(y | x_t, t) over the controls in the reward's place."""

    classifiers: dict[str, NoisyLikelihood]

    def guiding_reward(self, reward: Reward) -> RewardFunction:
        def noisy_reward(x_t: Tensor, labels: Labels, cond: Cond, t: Tensor | float) -> Tensor:
            classifiers = {name: At(likelihood, t) for name, likelihood in self.classifiers.items()}
            return Reward(classifiers, reward.gamma)(x_t, labels, cond)

        return noisy_reward

    def x_hat(self, target: Target, x_t: Tensor, t: Tensor | float) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            shift = tweedie_factor(target.denoiser.schedule, t, x) * gradient(target.log_tilt(x, t), x)
        return target.denoiser(x_t, t, **target.cond) + shift
