"""A `Denoiser` gives x̂ = E[x_0 | x_t], whatever the network behind it predicts.

With x_t = α x_0 + σ ε, every prediction in use is a linear view of x̂:

    ε:     x̂ = (x_t − σ ε)/α                     (Ho et al. 2020)
    x_0:   x̂ = prediction
    v:     v = α ε − σ x_0,  x̂ = α x_t − σ v     (Salimans & Ho 2022; α² + σ² = 1)
    flow:  v = ε − x_0,      x̂ = x_t − σ v       (α + σ = 1)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .schedule import Schedule, coefficients

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
Network = Callable[..., Tensor]
SMALLEST_ALPHA = 0.005  # diffusers' linear schedule of 1,000 steps ends at 0.0064


def x_hat_from(prediction: Tensor, kind: Prediction, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x̂ (B, *) from what a network predicted (B, *); α and σ broadcast against x_t."""
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


def clock(schedule: Schedule, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """The network's timestep, α_t and σ_t, float64, in the shape of t."""
    return schedule.timestep(t), *schedule(t)


class Denoiser(nn.Module):
    """E[x_0 | x_t]. Always in eval mode: dropout of a prior's own training is not part of its distribution."""

    schedule: Schedule
    shape: tuple[int, ...]  # of one x, without the batch
    start: float = 1.0  # the first time of its chains
    gradient_scale: float = 1.0  # what goes back through it is to be multiplied by, lest it vanish in half precision
    # of processes that each have a part of its weights and must call it together: (K, B) → (K, B of all of them)
    together: Callable[[Tensor], Tensor] | None = None

    def lower_scale(self) -> None:
        """What went back through it was too much."""
        self.gradient_scale = max(1.0, self.gradient_scale / 16)

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Tensor) -> Tensor:
        """x̂ (B, *) for x_t (B, *) at time t, a number or (B,), under conditions of B rows each."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its chains live: with its parameters, if it has any."""
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def prior(self) -> "Denoiser":
        """The pre-trained denoiser: this one itself, unless it is a policy."""
        return self

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, what is trained of this denoiser must not change, and nobody asks for its gradient."""
        yield

    @contextmanager
    def in_full(self) -> Iterator[None]:
        """Inside, the network computes in the precision of its weights."""
        yield

    def times(self, steps: int, sigma_end: float, power: float = 1.0) -> tuple[float, ...]:
        """The grid of a chain of this denoiser; see `Schedule.times`."""
        return self.schedule.times(steps, sigma_end, self.start, power)

    def train(self, mode: bool = True) -> "Denoiser":
        return super().train(False)


@dataclass(frozen=True)
class ControlSite:
    """Where a control enters a network: facts about its family, not choices.

    Args:
        embeddings: module names whose output is the time/class embedding; the control's embedding is added to it.
        width: length of that embedding.
        targets: PEFT's target modules of the LoRA adapter (names or endings of names).
        rank: of the adapter, unless it is told otherwise.
    """

    embeddings: tuple[str, ...]
    width: int
    targets: tuple[str, ...]
    rank: int = 64


class NetworkDenoiser(Denoiser):
    """A denoiser read off a network.

    Args:
        network: the module that holds the weights.
        call: (x_t, timestep (B,), **cond) → prediction (B, *). Extra channels (learned variance) are dropped.
        schedule: the noise schedule it was trained with.
        prediction: what it predicts.
        shape: of one x.
        clip: clamp x̂ to ±clip, for priors whose own sampler does; saturated pixels then carry no gradient.
        site: where a control enters; None if only its output can be controlled.
        precision: of the network's own arithmetic, by autocast; None for that of its weights. x̂ and all that comes of
            it keep the precision of x_t.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Network,
        schedule: Schedule,
        prediction: Prediction,
        shape: tuple[int, ...],
        clip: float | None = None,
        site: ControlSite | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.call = call
        self.schedule = schedule
        self.prediction = prediction
        self.shape = shape
        self.clip = clip
        self.site = site
        self.precision = precision
        if torch.float16 in (precision, self.stored):  # it has no numbers below 6e-8; bfloat16 has those of float32
            self.gradient_scale = 2.0**10
        if prediction == "epsilon":
            # x̂ = (x_t − σ ε)/α divides by almost nothing where α → 0: begin where its error is not yet all there is
            self.start = schedule.latest(SMALLEST_ALPHA)

    def called(self, call: Network) -> "NetworkDenoiser":
        """The same network, called otherwise."""
        return self._with(call, self.precision)

    def at(self, precision: torch.dtype | None) -> "NetworkDenoiser":
        """The same network in another precision."""
        return self._with(self.call, precision)

    def _with(self, call: Network, precision: torch.dtype | None) -> "NetworkDenoiser":
        same = self.network, call, self.schedule, self.prediction, self.shape, self.clip, self.site, precision
        other = NetworkDenoiser(*same)
        other.together = self.together
        return other

    @contextmanager
    def in_full(self) -> Iterator[None]:
        self.precision, before = None, self.precision
        # convolutions of float32 on TF32 cores have ten bits, as float16 has; that is how PyTorch ships
        units = torch.backends.cudnn, torch.backends.cuda.matmul
        allowed = [unit.allow_tf32 for unit in units]
        try:
            for unit in units:
                unit.allow_tf32 = False
            yield
        finally:
            self.precision = before
            for unit, had in zip(units, allowed, strict=True):
                unit.allow_tf32 = had

    @property
    def stored(self) -> torch.dtype | None:
        """The half precision the network's weights are stored in; None if it is not half."""
        first = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)
        return first if first in (torch.float16, torch.bfloat16) else None

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Tensor) -> Tensor:
        timestep, alpha, sigma = coefficients(clock, x_t, self.schedule, t)
        stored = self.stored
        given = {name: row.to(x_t.device, non_blocking=True) for name, row in cond.items()}
        with torch.autocast(x_t.device.type, self.precision, enabled=self.precision is not None):
            prediction = self.call(
                x_t if stored is None else x_t.to(stored), timestep.reshape(-1).expand(len(x_t)), **given
            )
        prediction = prediction[:, : x_t.shape[1]].to(x_t.dtype)
        x_hat = x_hat_from(prediction, self.prediction, x_t, alpha, sigma)
        return x_hat if self.clip is None else x_hat.clamp(-self.clip, self.clip)


def as_denoiser(
    function: Callable[..., Tensor], schedule: Schedule, shape: tuple[int, ...], prediction: Prediction = "sample"
) -> NetworkDenoiser:
    """Any callable (x_t, timestep, **cond) → prediction as a denoiser."""
    network = function if isinstance(function, nn.Module) else nn.Module()
    return NetworkDenoiser(network, function, schedule, prediction, shape)
