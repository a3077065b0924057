"""Declare what a control is. Policy = frozen prior + controls; where its label is null, a control leaves no trace.

The one the package trains (`lora.py`) is a PEFT LoRA adapter and a zero-initialised embedding, which a forward hook
adds to the network's time/class embedding. While it is active its layers have the weights W + BA, else the prior's:
there is no second copy, and the prior is bit-identical to the bare network.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.labels import NULL, LabelSpace
from ..system.files import write_text
from .plain import PlainLoRA

ABOUT, FORMAT = "control.json", 3  # files of 0.1 name no format: they have no interval
FORMAT_SEEING = 2  # of a control that sees the condition: older versions read it
ROUNDING = 1e-6


class NewerFormatError(ValueError):
    """Report a control that a newer version of this package saved."""


class Control(nn.Module, ABC):
    """Steer a prior by one label y of a `LabelSpace` (values, scale); NULL (−1) means uncontrolled.

    Outside its `interval` of noise levels σ_t a label is as if it were null. Its `gammas` are the smallest and the
    largest γ it is made for; None if that is a single one, the run's. One that does not see the prior's condition c is
    evaluated without it, and what it changes there is added to x̂ under c (`Policy.steered`).
    """

    fixed = False  # whether it keeps its parameters while other controls are trained

    def __init__(
        self, name: str, values: Sequence[str], scale: bool = False, interval: Sequence[float] | None = None,
        gammas: Sequence[float] | None = None, sees_condition: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.space = name, LabelSpace(tuple(values), scale)
        self.interval, self.sees_condition = interval, sees_condition
        if gammas is not None and not (len(gammas) == 2 and 0 < gammas[0] < gammas[1] < math.inf):
            two = "two, 0 < smallest < largest"
            raise ValueError(f"gammas of a control must be {two}, got {gammas}. Use None for a single γ.")
        self.gammas = gammas and (float(gammas[0]), float(gammas[1]))

    values = property(lambda self: self.space.values)
    size = property(lambda self: self.space.size)
    scale = property(lambda self: self.space.scale)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The noise levels σ_off and σ_on between which it speaks; None for everywhere."""
        return self._interval

    @interval.setter
    def interval(self, interval: Sequence[float] | None) -> None:
        bounds = None if interval is None else tuple(float(sigma) for sigma in interval)
        if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1] < math.inf):
            levels = "two noise levels, 0 ≤ σ_off < σ_on"
            raise ValueError(f"the interval of a control must be {levels}, got {interval}. Use None for everywhere.")
        self._interval = bounds

    def speaks(self, sigma: Tensor | float) -> Tensor:
        """Return whether it speaks at noise levels σ, in their shape."""
        sigma = torch.as_tensor(sigma)
        if self.interval is None:
            return torch.ones_like(sigma, dtype=torch.bool)
        off, on = self.interval
        # a bound that is the σ of a step includes it, whatever a vector or float32 makes of its last digits
        return (sigma >= off * (1 - ROUNDING)) & (sigma <= on * (1 + ROUNDING))

    def check_gamma(self, gamma: float | Tensor, trained: float) -> None:
        """Refuse (ValueError) a γ, or any of γ (B,), beyond `gammas`; of a control without, any but the trained."""
        least, most = (float(gamma.min()), float(gamma.max())) if isinstance(gamma, Tensor) else (gamma, gamma)
        low, high = self.gammas or (trained, trained)
        if not (least >= low * (1 - ROUNDING) and most <= high * (1 + ROUNDING)):
            wrong = least if least < low * (1 - ROUNDING) else most
            learned = f"γ = {low:g} … {high:g}" if self.gammas else f"γ = {trained:g} alone"
            advice = "" if self.gammas else " Train it with gammas: [0.5, 1, 2, 4] for others."
            raise ValueError(f"the control {self.name!r} was trained for {learned}, got {wrong:g}.{advice}")

    def fix(self) -> "Control":
        """Keep the parameters from now on, whatever other control is trained; return the control."""
        self.fixed = True
        for p in chain.from_iterable(self.parameter_groups().values()):
            p.requires_grad_(False)
        return self

    @abstractmethod
    def active(self, y: Tensor, gamma: float | Tensor = 1.0) -> AbstractContextManager[None]:
        """Return a context in which the prior it is attached to obeys y (B,) at γ, a number or (B,).

        Only a control with `gammas` is given γ.
        """

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by kind ("embedding", "adapter"): they need separate learning rates."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the control into a folder, with `write_about`."""

    @classmethod
    @abstractmethod
    def load(cls, folder: str | Path, denoiser: Any) -> "Control":
        """Attach a saved control to the prior it was trained on, with `read_about`."""

    def write_about(self, folder: str | Path, kind: str, *arguments: str) -> None:
        """Write `control.json`: the format, the kind, and by name the arguments that it is made of."""
        values = {key: getattr(self, key) for key in ("name", "values", *arguments, "interval")}
        if self.gammas is not None:  # files of a single γ do not name it
            values["gammas"] = self.gammas
        if not self.sees_condition:
            values["sees_condition"] = False
        version = FORMAT_SEEING if self.sees_condition else FORMAT
        # with every digit of the interval: it decides which steps are the prior's
        about = json.dumps({"format": version, "kind": kind, **values}, indent=2, allow_nan=False)
        write_text(Path(folder) / ABOUT, about + "\n")

    def as_lora(self, y: float, gamma: float) -> PlainLoRA:
        """Return the control at one label and γ as an ordinary LoRA.

        Raises:
            ValueError: it is none: another kind of control, or a network whose embedding is no bias of one layer.
        """
        raise ValueError(f"the control {self.name!r} is no LoRA, which is all that other programs read.")

    def scale_as_lora(self, strength: float) -> None:
        """Become what its files are in a program at a strength: weights scaled by it, a scale a line between two ends.

        Raises:
            ValueError: as `as_lora` does.
        """
        raise ValueError(f"the control {self.name!r} is no LoRA, which is all that other programs read.")

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
            rows: Tensor = table(torch.where(y == NULL, self.size, y))
            return rows
        low = y.clamp(0, self.size - 2).long()
        between: Tensor = torch.lerp(table(low), table(low + 1), (y - low).to(table.weight)[:, None])
        return torch.where((y == NULL)[:, None], 0.0, between)

    def new_gamma_tables(self, width: int) -> nn.ModuleList:
        """Make the zero-initialised tables T1 and T2 of `embedded_at`; none for a single γ."""
        zeros, count = torch.zeros(self.size + 1, width), 0 if self.gammas is None else 2
        options = {"freeze": False, "padding_idx": self.size}
        return nn.ModuleList(nn.Embedding.from_pretrained(zeros.clone(), **options) for _ in range(count))

    def embedded_at(self, tables: Sequence[nn.Embedding], y: Tensor, gamma: float | Tensor) -> Tensor:
        """Return T0[y] + g T1[y] + g² T2[y], with g = log γ / log 4 of each row; T0[y] alone of a single table."""
        first, *others = (self.embedded(table, y) for table in tables)
        if not others:
            return first
        g = (torch.as_tensor(gamma).to(first).log() / math.log(4)).view(-1, 1)
        return sum((g**power * rows for power, rows in enumerate(others, start=1)), start=first)


def read_about(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """Read `control.json`: a control's kind, in files of 0.1 a LoRA, and the arguments that it is made of.

    Raises:
        NewerFormatError: a newer version of this package saved it.
    """
    path = Path(folder) / ABOUT
    about = {"format": 1, "kind": "lora", "interval": None} | json.loads(path.read_text(encoding="utf-8"))
    if (version := about.pop("format")) > FORMAT:
        reads = f"this version of ctrl-diffusion reads formats up to {FORMAT}"
        raise NewerFormatError(f"{path} has format {version}, {reads}. Install a newer version.")
    return about.pop("kind"), about
