"""Reward backpropagation: differentiate −J through the rollout.

    −J = E[ Σ_i ½‖u_i‖² − r(x_0) ],      x_{i+1} = mean_g(x_i) + std_i z_i,

with the noise z held fixed, so that the gradient is pathwise (Clark et al. 2024; Prabhudesai et al. 2024). Every step
is checkpointed by `rollout`. What a path sends back is clipped at every state, per sample: a few steep paths would
otherwise own the batch. Truncation cuts the reward's way back, never a step's own KL.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor

from ..chain.denoise import loss_scale
from ..chain.transition import step_std
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..reward.reward import Reward
from .on_policy import OnPolicy, check_gradient, clip_rows
from .step import Carried, LearnerSettings, Step


@dataclass
class Backprop(OnPolicy):
    """The learner.

    Args:
        times, batch, eta, micro: see `OnPolicy`; one rollout an update.
        clip: largest norm of std_i ∇J at the state after step i, what one path may ask of the step's control.
        through: the number of last steps that the reward reaches; None for all.
    """

    batch: int = 64
    clip: float = 10.0
    through: int | None = None

    def __call__(
        self,
        policy: Policy,
        reward: Reward,
        conditions: Conditions,
        generator: torch.Generator,
        carried: Carried = None,
    ) -> Iterator[Step]:
        """Losses without end; how many gradients an update clipped is known after its backward pass, so it is logged
        with the next.
        """
        first = 0 if self.through is None else max(0, self.steps - self.through)
        stds = [float(step_std(policy.schedule, t, s, self.eta)) for t, s in pairwise(self.times)]
        clipped = [] if carried is None else carried

        def at_state(i: int, x_t: Tensor) -> Tensor:
            if i <= first:
                return x_t.detach()
            if x_t.requires_grad:
                x_t.register_hook(partial(clip, std=stds[i - 1]))
            return x_t

        def clip(gradient: Tensor, std: float) -> Tensor:
            # the loss is a mean over the batch, one path's share of the gradient is a B-th
            gradient, longer = clip_rows(gradient, loss_scale(policy) * self.clip / std / self.batch)
            clipped.append(longer)
            return gradient

        while True:
            done, before = 0, self.weight * float(torch.cat(clipped).float().mean()) if clipped else 0.0
            clipped.clear()
            for path, pair, labels, cond in self.fresh_paths(
                policy, conditions, generator, compare=True, at_state=at_state
            ):
                earned, kl = reward(path.x_0, labels, cond), path.kl.sum(0)
                check_gradient(earned)
                done += len(pair)
                last = done == self.mine.stop - self.mine.start
                figures = {"reward": earned.detach().sum() / self.batch, "clipped": before if last else 0.0}
                figures["kl"] = kl.detach().sum() / self.batch
                yield Step((kl - earned).sum() / self.batch, figures, last)


class BackpropSettings(LearnerSettings):
    """`learn/backprop.py`; `through` is the number of last steps the reward's gradient reaches, all of them if null."""

    updates: int = Field(200, ge=1)
    batch: int = Field(64, ge=1)
    clip: float = Field(10.0, gt=0)
    through: int | None = Field(None, ge=1)
