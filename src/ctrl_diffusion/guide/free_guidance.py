"""Classifier-free guidance on y (Ho & Salimans 2022, eq. 6): x̂ = x̂_null + w (x̂_y − x̂_null).

The conditional denoiser is a policy, a control of the size CTRL has, regressed on labelled data by `learn/labelled.py`
in `train.fit`. Its null label is the frozen prior, so that x̂_null needs no training and cannot be lost. It knows no p̂:
at w = 1 it samples the labels' own conditional, at another w nothing that has a name (Bradley & Nakkiran 2024).

Controls that were never trained together are added, x̂_null + w Σ (x̂_{y_k} − x̂_null) (Liu et al. 2022), as if
the labels were independent given x_t as they are given x_0.
"""

from dataclasses import dataclass

from torch import Tensor

from .method import Asked
from .steered import Guidance


@dataclass
class FreeGuidance(Guidance):
    """The sampler; called with the policy as denoiser. The reward is not asked.

    Args:
        together: the policy was trained on rows that have all the labels, and is asked for all at once.
    """

    together: bool = False

    def x_hat(self, asked: Asked, x_t: Tensor, t: Tensor | float) -> Tensor:
        policy, labels, cond = asked.denoiser, asked.labels, asked.cond
        if self.together or len(labels) == 1:
            return policy(x_t, t, labels, asked.strength, **cond)
        x_hat = policy.prior(x_t, t, **cond)
        return x_hat + asked.strength * sum(policy(x_t, t, {name: y}, **cond) - x_hat for name, y in labels.items())
