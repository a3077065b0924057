"""Policy = frozen prior + controls; everything a control does vanishes when its label is null.

A control adds to the prior where the prior's family lets it: one PEFT LoRA adapter, and one zero-initialised embedding
added to the network's time/class embedding by a forward hook. While a control is active its layers have the weights
W + BA; outside, the prior's own: no second copy, and bit-identical to the bare network.
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
    """One control y with classes 0 … size − 1; NULL (−1) means uncontrolled.

    y may also be on a scale: its values are then evenly spaced levels 0 … size − 1, and a label is a place between
    them, a float.

    Args:
        name: the label's name.
        values: what the user calls the classes or levels, in order.
        scale: whether y is on a scale.
    """

    fixed = False  # whether it stays as it is while others are trained beside it

    def __init__(self, name: str, values: Sequence[str], scale: bool = False) -> None:
        super().__init__()
        self.name, self.space = name, LabelSpace(tuple(values), scale)

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the classes or levels, in order."""
        return self.space.values

    @property
    def size(self) -> int:
        """The number of classes or levels."""
        return self.space.size

    @property
    def scale(self) -> bool:
        """Whether y is on a scale."""
        return self.space.scale

    def fix(self) -> "Control":
        """Never train it again, whatever is trained beside it."""
        self.fixed = True
        for p in chain.from_iterable(self.parameter_groups().values()):
            p.requires_grad_(False)
        return self

    def label_of(self, value: str | float) -> int | float:
        """Return the label of a value, as the user writes it.

        Raises:
            ValueError: there is no such value.
        """
        return self.space.label_of(value, self.name)

    @abstractmethod
    def active(self, y: Tensor) -> AbstractContextManager[None]:
        """A context within which the prior it is attached to obeys y (B,)."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by kind ("embedding", "adapter"): they need separate learning rates."""

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
        """Inside, the parameters must not change, and nobody asks for their gradient: only for that of x."""
        asked = [(p, p.requires_grad) for group in self.parameter_groups().values() for p in group]
        for p, _ in asked:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p, before in asked:
                p.requires_grad_(before)

    def embedded(self, table: nn.Embedding, y: Tensor) -> Tensor:
        """Rows (B, width) of a table for labels y: null is the last, which stays zero; between levels on a line."""
        y = y.to(table.weight.device, non_blocking=True)
        if not y.is_floating_point():
            return table(torch.where(y == NULL, self.size, y))
        low = y.clamp(0, self.size - 2).long()
        between = torch.lerp(table(low), table(low + 1), (y - low).to(table.weight)[:, None])
        return torch.where((y == NULL)[:, None], 0.0, between)
