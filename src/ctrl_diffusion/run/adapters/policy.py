"""Sample a prior with a LoRA of any origin in it: a denoiser beside its base, on the same weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...chain.denoise import Denoiser
from ...prior.network import NetworkDenoiser
from .names import layers_of
from .read import Adapter


class AdaptedDenoiser(Denoiser):
    """Give a prior's network the weights W + s ΔW, and biases likewise, while it is called; `prior` is the base itself.

    The sums are kept: the layers that a LoRA changes are there twice. Where ΔW is zero, W + s ΔW is W bit for bit.

    Args:
        base: the prior.
        adapter: what is added, for this network.
        strength: s, as other programs scale weights.
    """

    def __init__(self, base: NetworkDenoiser, adapter: Adapter, strength: float = 1.0) -> None:
        super().__init__()
        self.base, self.schedule, self.shape, self.start = base, base.schedule, base.shape, base.start
        layers = layers_of(base.network)
        self._sums = [
            (layers[layer]._parameters, name,
             self._sum(getattr(layers[layer], name), delta, layers[layer].weight, strength))
            for name, deltas in (("weight", adapter.weights), ("bias", adapter.biases))
            for layer, delta in deltas.items()
        ]  # fmt: skip
        self.eval()

    @staticmethod
    @torch.no_grad()
    def _sum(parameter: Tensor | None, delta: Tensor, weight: Tensor, strength: float) -> Tensor:
        change = strength * delta.to(weight)
        return change if parameter is None else parameter + change  # a layer without a bias is given one

    @property
    def prior(self) -> Denoiser:
        return self.base

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Tensor) -> Tensor:
        with self._added():
            return self.base(x_t, t, **cond)

    @contextmanager
    def _added(self) -> Iterator[None]:
        """Put the sums in the place of the base's parameters inside."""
        before = [parameters[name] for parameters, name, _ in self._sums]
        try:
            for parameters, name, value in self._sums:
                parameters[name] = value
            yield
        finally:
            for (parameters, name, _), parameter in zip(self._sums, before, strict=True):
                parameters[name] = parameter
