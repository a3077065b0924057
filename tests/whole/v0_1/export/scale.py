"""y on a scale: evenly spaced levels 0 … K − 1 over the central 90 % of its values, and places between them."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

LEVELS = 9


def levels_of(texts: Sequence[str]) -> tuple[str, ...]:
    """Names of evenly spaced levels over the central 90 % of numbers."""
    low, high = np.quantile([float(text) for text in texts], [0.05, 0.95])
    return tuple(f"{value:.4g}" for value in np.linspace(low, high, LEVELS))


def places(numbers: Tensor | float, levels: Sequence[str]) -> Tensor | float:
    """Where numbers (n,), or one, lie on a scale: 0 at its first level, K − 1 at its last."""
    first, last = float(levels[0]), float(levels[-1])
    return (numbers - first) / (last - first) * (len(levels) - 1)


def number_at(place: float, levels: Sequence[str]) -> float:
    """The number at a place on a scale."""
    first, last = float(levels[0]), float(levels[-1])
    return first + place / (len(levels) - 1) * (last - first)


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
