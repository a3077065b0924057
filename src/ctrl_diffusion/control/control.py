"""Declare what a control is. Policy = frozen prior + controls; where its label is null, a control leaves no trace.

The one the package trains (`lora.py`) is a PEFT LoRA adapter and a zero-initialised embedding, which a forward hook
adds to the network's time/class embedding. While it is active its layers have the weights W + BA, else the prior's:
there is no second copy, and the prior is bit-identical to the bare network.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from ..chain.denoise import Denoiser
from ..data.labels import NULL, LabelSpace


class Control(nn.Module, ABC):
    """Steer a prior by one label y of a `LabelSpace` (values, scale); NULL (−1) means uncontrolled."""

    fixed = False  # whether it keeps its parameters while other controls are trained

    def __init__(self, name: str, values: Sequence[str], scale: bool = False) -> None:
        super().__init__()
        self.name, self.space = name, LabelSpace(tuple(values), scale)

    values = property(lambda self: self.space.values)
    size = property(lambda self: self.space.size)
    scale = property(lambda self: self.space.scale)

    def fix(self) -> "Control":
        """Keep the parameters from now on, whatever other control is trained; return the control."""
        self.fixed = True
        for p in chain.from_iterable(self.parameter_groups().values()):
            p.requires_grad_(False)
        return self

    @abstractmethod
    def active(self, y: Tensor) -> AbstractContextManager[None]:
        """Return a context in which the prior it is attached to obeys y (B,)."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by kind ("embedding", "adapter"): they need separate learning rates."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the control into a folder, with a `control.json` that says its `kind`."""

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path, denoiser: Denoiser) -> "Control":
        """Attach a saved control to the prior it was trained on."""

    def lora(self, component: str) -> dict[str, Tensor]:
        """Return the weights as diffusers loads a LoRA of a pipeline's component; none if the control is no LoRA."""
        return {}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Take no gradient of the parameters inside, only that of x; they must not change there."""
        before = [(p, p.requires_grad) for group in self.parameter_groups().values() for p in group]
        for p, _ in before:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p, requires_grad in before:
                p.requires_grad_(requires_grad)

    def embedded(self, table: nn.Embedding, y: Tensor) -> Tensor:
        """Return rows (B, width) of a table for labels y: the last, zero, for null; interpolated between levels."""
        y = y.to(table.weight.device, non_blocking=True)
        if not y.is_floating_point():
            return table(torch.where(y == NULL, self.size, y))
        low = y.clamp(0, self.size - 2).long()
        between = torch.lerp(table(low), table(low + 1), (y - low).to(table.weight)[:, None])
        return torch.where((y == NULL)[:, None], 0.0, between)
