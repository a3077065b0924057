"""Read a denoiser off a network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..chain.denoise import SMALLEST_ALPHA, Denoiser, Prediction, x_hat_from
from ..chain.schedule import Schedule, coefficients
from .parts import refusing
from .precision import MixedPrecision

Call = Callable[..., Tensor]  # (x_t, timestep (B,), **cond) → prediction (B, *)


@dataclass(frozen=True)
class ControlSite:
    """Name where a control enters a network: facts about its family, not choices."""

    embeddings: tuple[str, ...]  # modules whose output, the time or class embedding, the control's is added to
    width: int  # length of that embedding
    targets: tuple[str, ...]  # PEFT's target modules of the LoRA adapter (names or endings of names)
    rank: int = 64  # default of the adapter
    biased: str = ""  # the linear layer of which the control's embedding is a shift of the bias; "" if there is none


def last_linear(network: nn.Module, name: str) -> str:
    """Return the name of a time embedding's last layer; "" if it has no bias, or something comes after it."""
    embedding, _, layer = name.rpartition(".")
    module = network.get_submodule(embedding)
    last = getattr(module, layer).bias is not None and getattr(module, "post_act", None) is None
    return name if last else ""


def clock(schedule: Schedule, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the network's timestep, α_t and σ_t, float64, in the shape of t."""
    return schedule.timestep(t), *schedule(t)


def check_prediction(predicted: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Refuse a prediction that is not of the shape (B, C, *) of x_t, or (B, 2 C, *) with a learned variance."""
    batch, channels, *sides = shape
    if tuple(predicted) not in ((batch, channels, *sides), (batch, 2 * channels, *sides)):
        shapes = " for ".join(" × ".join(map(str, each[1:])) for each in (predicted, shape))
        raise ValueError(f"its network predicts {shapes}: needed is the same, or twice the channels (learned variance)")


class OnMeta(nn.Module):
    """Call a function of a module with the module's weights on the meta device: shapes are computed, values are not."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.function(*arguments, **options)


@torch.no_grad()
def shape_of(
    module: nn.Module, function: Callable[..., Tensor], shape: tuple[int, ...], **rows: Tensor
) -> tuple[int, ...] | None:
    """Return the shape of what a function that calls a module gives for an input of a shape, without computing it.

    `rows` are further inputs. None if an operator of the module cannot tell shapes alone.
    """
    tensors = list(chain(module.named_parameters(), module.named_buffers()))
    dtype = next((tensor.dtype for _, tensor in tensors if tensor.is_floating_point()), torch.float32)
    weights = {f"module.{name}": tensor.to("meta") for name, tensor in tensors}
    rows = {name: row.to("meta", dtype if row.is_floating_point() else None) for name, row in rows.items()}
    try:
        result = functional_call(
            OnMeta(module, function), weights, (torch.empty(shape, device="meta", dtype=dtype),), rows
        )
    except NotImplementedError:
        return None
    return tuple(result.shape)


def check_call(network: nn.Module, call: Callable[..., Tensor], shape: tuple[int, ...], **rows: Tensor) -> None:
    """Refuse a network of diffusers that cannot be called for x of a shape, or predicts another, without computing.

    `rows` are its other inputs, of two rows each.
    """
    if not isinstance(network, diffusers.ModelMixin):  # another may keep what it computes
        return

    def called(x_t: Tensor, **options: Tensor) -> Tensor:
        return call(x_t, torch.zeros(2, device="meta"), **options)

    with refusing("its network cannot be called with what this pipeline gives it"):
        predicted = shape_of(network, called, (2, *shape), **rows)
    check_prediction(predicted or (2, *shape), (2, *shape))


class NetworkDenoiser(MixedPrecision, Denoiser):
    """Read x̂ off a network's prediction.

    Args:
        network: the module that holds the weights; it is frozen.
        call: (x_t, timestep (B,), **cond) → prediction (B, *). Extra channels (learned variance) are dropped.
        schedule, prediction: the noise schedule it was trained with, and what it predicts.
        clip: clamp x̂ to ±clip, for priors whose own sampler does; saturated pixels then carry no gradient.
        site: where a control enters; None if only its output can be controlled.
    """

    # of sharded weights: (K, B) of this rank → (K, B of all ranks); then all ranks must call the network in step
    all_gather: Callable[[Tensor], Tensor] | None = None
    passes_clip = False  # whether a clipped x̂ has the gradient of one that is not
    null_call: Callable[[Tensor, Tensor], Tensor] | None = None  # of a conditional network: under no condition

    def __init__(
        self, network: nn.Module, call: Call, schedule: Schedule, prediction: Prediction, shape: tuple[int, ...],
        clip: float | None = None, site: ControlSite | None = None, precision: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.call, self.schedule, self.prediction, self.shape = call, schedule, prediction, shape
        self.clip, self.site = clip, site
        self.set_precision(precision)
        if prediction == "epsilon":
            # x̂ = (x_t − σ ε)/α divides by almost nothing where α → 0: begin where its error is not yet all there is
            self.start = schedule.latest(SMALLEST_ALPHA)

    def with_call(self, call: Call) -> "NetworkDenoiser":
        """Return a denoiser on the same network, called in another way, in which it has a condition or none."""
        settings = self.schedule, self.prediction, self.shape, self.clip, self.site, self.precision
        other = NetworkDenoiser(self.network, call, *settings)
        other.all_gather = self.all_gather
        return other

    @contextmanager
    def straight_through(self) -> Iterator[None]:
        before, self.passes_clip = self.passes_clip, True
        try:
            yield
        finally:
            self.passes_clip = before

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Tensor) -> Tensor:
        """Return x̂ (B, *); without any condition that of the null class or prompt, where the network has one."""
        call = self.call if cond or self.null_call is None else self.null_call
        timestep, alpha, sigma = coefficients(clock, x_t, self.schedule, t)
        rows = {name: value.to(x_t.device, non_blocking=True) for name, value in cond.items()}
        with torch.autocast(x_t.device.type, self.precision, enabled=self.precision is not None):
            prediction = call(x_t.to(self.stored or x_t.dtype), timestep.reshape(-1).expand(len(x_t)), **rows)
        check_prediction(prediction.shape, x_t.shape)  # of other channels it would be broadcast without a word
        x_hat = x_hat_from(prediction[:, : x_t.shape[1]].to(x_t.dtype), self.prediction, x_t, alpha, sigma)
        if self.clip is None:
            return x_hat
        clipped = x_hat.clamp(-self.clip, self.clip)
        return x_hat + (clipped - x_hat).detach() if self.passes_clip else clipped


def as_denoiser(
    function: Call, schedule: Schedule, shape: tuple[int, ...], prediction: Prediction = "sample"
) -> NetworkDenoiser:
    """Return any callable (x_t, timestep, **cond) → prediction as a denoiser."""
    network = function if isinstance(function, nn.Module) else nn.Module()
    return NetworkDenoiser(network, function, schedule, prediction, shape)
