"""Backpropagate the reward: differentiate −J through the rollout.

    −J = E[ Σ_i ½‖u_i‖² − r(x_0) ],      x_{i+1} = mean_g(x_i) + std_i z_i,

with the noise z held fixed, so that the gradient is pathwise (Clark et al. 2024; Prabhudesai et al. 2024). Every step
is checkpointed by `rollout`. The gradient of each path is clipped at every state, else a few steep paths would dominate
the batch. Truncation stops the reward's gradient, never that of a step's own KL.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from ..chain.denoise import loss_scale
from ..chain.transition import step_std
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..reward.reward import Reward
from .on_policy import OnPolicy, check_gradient, clip_rows
from .step import Carried, Evaluations, LearnerSettings, Step, steps_to_learn


class Backprop(OnPolicy):
    """Learn by backpropagation, one rollout an update; arguments as of `OnPolicy`."""

    class Settings(LearnerSettings):
        """Hold the settings of `Backprop`.

        Args:
            clip: largest norm of std_i ∇J after step i, the control that one path may demand of it.
            through: last steps that the reward's gradient reaches; null for all.
        """

        kept_states: ClassVar[int] = 2  # states and noise
        updates: int = Field(200, ge=1)
        batch: int = Field(64, ge=1)
        clip: float = Field(10.0, gt=0)
        through: int | None = Field(None, ge=1)

        def evaluations(self, steps: int) -> Evaluations:
            return Evaluations(2 * steps, 2 * steps)  # policy and prior, each once more on the way back

    settings: Settings
    differentiates = True

    def __call__(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator, carried: Carried = None
    ) -> Iterator[Step]:
        steps_to_learn(policy, self.times)  # refuses a chain on which nothing speaks
        first = max(0, self.steps - (self.settings.through or self.steps))  # the state that the reward stops at
        stds = [float(step_std(policy.schedule, t, s, self.eta)) for t, s in pairwise(self.times)]
        # which gradients were clipped is known after the backward pass, so it is logged with the next update
        clipped = [] if carried is None else carried

        def at_state(i: int, x_t: Tensor) -> Tensor:
            if i <= first:
                return x_t.detach()
            if x_t.requires_grad:
                x_t.register_hook(partial(clip, std=stds[i - 1]))
            return x_t

        def clip(gradient: Tensor, std: float) -> Tensor:
            # the loss is a mean over the batch, one path's share of the gradient is a B-th
            gradient, longer = clip_rows(gradient, loss_scale(policy) * self.settings.clip / std / self.batch)
            clipped.append(longer)
            return gradient

        while True:
            rows, share = 0, self.weight * float(torch.cat(clipped).float().mean()) if clipped else 0.0
            clipped.clear()
            batches = self.fresh_paths(policy, conditions, generator, compare=True, at_state=at_state)
            for path, pair, labels, cond, gamma in batches:
                assert path.kl is not None  # compared
                rewards, kl = reward(path.end, labels, cond, **gamma), path.kl.sum(0)
                check_gradient(rewards)
                rows += len(pair)
                last = rows == self.rows.stop - self.rows.start
                metrics: dict[str, float | Tensor] = {
                    "reward": rewards.detach().sum() / self.batch,
                    "clipped": share if last else 0.0,
                }
                metrics["kl"] = kl.detach().sum() / self.batch
                yield Step((kl - rewards).sum() / self.batch, metrics, last)
