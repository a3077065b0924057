"""Say what a label is: a class, a place on a scale, or null."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from .names import as_text, by_key, find, is_number

NULL = -1
LEVELS = 9
Labels = dict[str, Tensor]
Number = TypeVar("Number", Tensor, float)


@dataclass(frozen=True)
class LabelSpace:
    """Describe what a label y is: one of a few classes, or a place on a scale.

    The label of a class is its number 0 … size − 1. A scale has evenly spaced levels 0 … size − 1 and its label is a
    float between them. NULL (−1) is no label, in both.
    """

    values: tuple[str, ...]  # what the user calls the classes or levels, in order; levels are numbers
    scale: bool = False  # whether y is on a scale

    @classmethod
    def from_numbers(cls, texts: Iterable[str]) -> "LabelSpace":
        """Build the scale whose levels are spread over the central 90 % of numbers."""
        low, high = np.quantile([float(text) for text in texts], [0.05, 0.95])
        return cls(tuple(f"{value:.4g}" for value in np.linspace(low, high, LEVELS)), scale=True)

    @property
    def size(self) -> int:
        """K, the number of classes or levels."""
        return len(self.values)

    @property
    def ends(self) -> tuple[float, float]:
        """The numbers of a scale's first and last level."""
        return float(self.values[0]), float(self.values[-1])

    def places(self, numbers: Number) -> Number:
        """Return where numbers (n,), or one, lie on the scale: 0 at its first level, K − 1 at its last."""
        first, last = self.ends
        return (numbers - first) / (last - first) * (self.size - 1)

    def label_of(self, value: str | float, name: str) -> int | float:
        """Return the label of a value, in any spelling of it; refuse (ValueError) any other value of `name`."""
        text = as_text(value)
        if self.scale:
            place = float(self.places(float(text))) if is_number(text) else NULL
            if not 0 <= place <= self.size - 1:
                raise ValueError(
                    f"{name} must be a number in {self.values[0]} … {self.values[-1]}, got {str(value)!r}."
                )
            return place
        if (known := find(text, by_key(self.values))) is None:
            raise ValueError(f"{name} must be one of {', '.join(self.values)}, got {str(value)!r}.")
        return self.values.index(known)

    def text_of(self, label: float) -> str:
        """Return the text of a label: its class, its number on the scale, blank for null."""
        if label == NULL:
            return ""
        if not self.scale:
            return self.values[int(label)]
        first, last = self.ends
        return f"{first + label / (self.size - 1) * (last - first):.6g}"

    def nearest(self, y: Tensor) -> Tensor:
        """Return the class number, or the number of the nearest level, of labels y (n,), none of them null.

        A place on the scale that is not known, NaN, has none: NULL.
        """
        return y.round().clamp(0, self.size - 1).nan_to_num(NULL).long() if self.scale else y

    def check(self, y: Tensor, name: str) -> None:
        """Refuse (ValueError) labels (n,) of `name` that are no classes, or off the scale; null is allowed."""
        last = self.size - 1
        if y.max() > last or ((y < 0) & (y != NULL)).any():
            got = f"{y.min():g} … {y.max():g}"
            raise ValueError(f"labels of {name!r} must lie in 0 … {last} (−1 for null), got {got}.")
        if y.is_floating_point() and not self.scale:
            raise ValueError(f"labels of {name!r} are classes: whole numbers, got {y.dtype}.")
