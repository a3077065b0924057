"""Read scikit-learn's digits, and measure their ink and slant, for which the digit c makes no difference."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIGIT, INK, SLANT = "digit", "ink", "slant"
VALUES = {DIGIT: tuple("0123456789"), INK: tuple("1234"), SLANT: ("left", "right")}
UPRIGHT = (0, 1, 2, 3, 4, 5, 8, 9)  # digits that lean either way
# of scikit-learn's digits: the quartiles of their ink, the median slant of those that lean either way
INK_CUTS = (285 / 1024, 313 / 1024, 338 / 1024)
SLANT_CUT = -0.03866567835211754


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits: x (1797, 1, 8, 8) in [−1, 1], white ink on black, and c (1797,) in 0..9."""
    from sklearn.datasets import load_digits

    x, c = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(c)


def split() -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of `digits()` the prior is trained on, and the rows it never sees."""
    from sklearn.model_selection import train_test_split

    c = digits()[1].numpy()
    trained, unseen = train_test_split(np.arange(len(c)), test_size=300, stratify=c, random_state=0)
    return trained, unseen


def on_paper(x: Tensor) -> Tensor:
    """Bring x (n, C, H, W) in [−1, 1] to the scale 0 … 1; values outside are clipped, as in a file."""
    return (x.clamp(-1, 1) + 1) / 2


def ink(x: Tensor, c: Tensor | None = None) -> Tensor:
    """Return the mean pixel on the scale 0 … 1: (n,) of x (n, C, H, W) in [−1, 1]."""
    return on_paper(x).flatten(1).mean(1)


class Moments(NamedTuple):
    """Hold what the first two moments of ink (n, H, W) say, in pixels."""

    right: Tensor  # (n,), centre, from the left border
    up: Tensor  # (n,), centre, above the upper border, negative
    slope: Tensor  # (n,), of ink's columns on its rows, pixels right per pixel up


def moments(paper: Tensor) -> Moments:
    """Compute the centre of ink (n, H, W), and the slope of its columns on its rows."""
    height, width = paper.shape[1:]
    up, right = torch.meshgrid(-torch.arange(height).to(paper), torch.arange(width).to(paper), indexing="ij")
    total = paper.sum((1, 2)).clamp(min=1e-6)  # an empty sheet does not lean
    centre_up, centre_right = ((paper * axis).sum((1, 2)) / total for axis in (up, right))
    up, right = up - centre_up[:, None, None], right - centre_right[:, None, None]
    slope = (paper * up * right).sum((1, 2)) / (paper * up * up).sum((1, 2)).clamp(min=1e-6)
    return Moments(centre_right, centre_up, slope)


def slant(x: Tensor, c: Tensor | None = None) -> Tensor:
    """Return the slope (n,) of ink's columns on its rows, pixels right per pixel up, of x (n, C, H, W) in [−1, 1]."""
    return moments(on_paper(x).mean(1)).slope


def ink_ruler(x: Tensor, c: Tensor | None = None) -> Tensor:
    """Return the true ink class 0 … 3 (n,) of x (n, C, H, W)."""
    return torch.bucketize(ink(x), torch.tensor(INK_CUTS, device=x.device), right=True)


def slant_ruler(x: Tensor, c: Tensor | None = None) -> Tensor:
    """Return the true slant class 0, 1 (n,) of x (n, C, H, W): left or right of the median of the digits that lean."""
    return (slant(x) > torch.tensor(SLANT_CUT, device=x.device)).long()
