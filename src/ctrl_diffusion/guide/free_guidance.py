"""Guide on y without a classifier (Ho & Salimans 2022, eq. 6): x̂_y = x̂_null + w (x̂(x_t, y) − x̂_null).

The conditional denoiser is a policy, with a control of CTRL's size regressed on labelled data by `learn/labelled.py`.
Its null label is the frozen prior, so that x̂_null needs no training. It has no p̂: at w = 1 it samples the labels' own
conditional, at another w a distribution without a name (Bradley & Nakkiran 2024).

Controls that were never trained together are added, x̂_null + w Σ_k (x̂(x_t, y_k) − x̂_null) (Liu et al. 2022), as if
the labels were independent given x_t as they are given x_0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .method import Target
from .steered import Guidance


@dataclass
class FreeGuidance(Guidance):
    """Sample by classifier-free guidance, called with the policy as denoiser; the reward is not evaluated."""

    together: bool = False  # whether the policy was trained on rows with all labels, and takes all at once

    def x_hat(self, target: Target, x_t: Tensor, t: Tensor | float) -> Tensor:
        policy, labels, cond, w = target.denoiser, target.labels, target.cond, target.strength
        if self.together or len(labels) == 1:
            return policy(x_t, t, labels=labels, strength=w, **cond)
        x_hat = policy.prior(x_t, t, **cond)
        effects = (policy(x_t, t, labels={name: y}, **cond) - x_hat for name, y in labels.items())
        return x_hat + w * sum(effects, start=torch.zeros(()).to(x_hat))
