"""Define a denoiser: x̂ = E[x_0 | x_t], whatever the network behind it predicts.

With x_t = α x_0 + σ ε, every prediction in use is a linear view of x̂:

    ε:     x̂ = (x_t − σ ε)/α                     (Ho et al. 2020)
    x_0:   x̂ = prediction
    v:     v = α ε − σ x_0,  x̂ = α x_t − σ v     (Salimans & Ho 2022; α² + σ² = 1)
    flow:  v = ε − x_0,      x̂ = x_t − σ v       (α + σ = 1)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .schedule import Focus, Schedule

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
SMALLEST_ALPHA = 0.005  # diffusers' linear schedule of 1,000 steps ends at 0.0064


def x_hat_from(prediction: Tensor, kind: Prediction, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x̂ (B, *) from a network's prediction (B, *); α and σ broadcast against x_t."""
    match kind:
        case "epsilon":
            return (x_t - sigma * prediction) / alpha
        case "sample":
            return prediction
        case "v_prediction":
            return alpha * x_t - sigma * prediction
        case "flow":
            return x_t - sigma * prediction
    raise ValueError(f"prediction must be epsilon, sample, v_prediction or flow, got {kind!r}.")


class Denoiser(nn.Module):
    """Estimate E[x_0 | x_t], always in eval mode: dropout is not part of a prior's distribution."""

    schedule: Schedule
    shape: tuple[int, ...]  # of one x, without the batch
    start: float = 1.0  # the first time of its chains
    loss_scale: float = 1.0  # above 1 if its network computes in float16

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """Return x̂ (B, *) for x_t (B, *) at time t, a number or (B,), under conditions of B rows each."""
        raise NotImplementedError

    if TYPE_CHECKING:  # a module's call is untyped

        def __call__(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
            """Return what `forward` does."""

    @property
    def device(self) -> torch.device:
        """The device of its parameters; the CPU if it has none."""
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def prior(self) -> "Denoiser":
        """The pre-trained denoiser: this one itself, unless it is a policy."""
        return self

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Promise that inside no trained parameter changes and no gradient of one is needed."""
        yield

    def speaks(self, t: float, labels: Any = None, strength: float = 1.0, gamma: Any = None) -> bool:
        """Return whether x̂ may depend on what is trained at time t; of a policy, under labels and at a strength."""
        return True

    def active_steps(self, times: Sequence[float]) -> Tensor:
        """Return the steps of a chain, numbered from 0, at which x̂ may depend on what is trained."""
        return torch.arange(len(times) - 1)

    @contextmanager
    def straight_through(self) -> Iterator[None]:
        """Give a clipped x̂ inside the gradient of one that is not clipped, which saturated pixels lack."""
        yield

    def times(self, steps: int, sigma_end: float, power: float = 1.0, focus: Focus | None = None) -> tuple[float, ...]:
        """Return the grid of a chain of this denoiser; see `Schedule.times`."""
        return self.schedule.times(steps, sigma_end, self.start, power, focus)

    def train(self, mode: bool = True) -> "Denoiser":
        """Stay in eval mode."""
        return super().train(False)


def loss_scale(denoiser: Denoiser) -> float:
    """Return the loss scale of a denoiser's prior: above 1 if its network computes in float16."""
    return denoiser.prior.loss_scale
