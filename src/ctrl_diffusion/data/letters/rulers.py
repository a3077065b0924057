"""Measure the weight, slant and width of letters from their pictures.

A picture (1, 32, 32) shows one of 62 letters, ink bright, capitals CAP pixels high, on a baseline BASELINE pixels below
the upper border. Slant and width depend on which letter it is: an R leans by its shape, and an m is wide. What is
expected of each letter was measured on upright faces and lies in rulers.npz.
"""

from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..digits import moments, on_paper

CHARACTERS = digits + ascii_uppercase + ascii_lowercase  # a digit is its own number as a class, too
SIDE, CAP, BASELINE = 32, 18, 24  # pixels
FINER = 4  # the picture is enlarged this much before distances are measured
HALF = SIDE // 2  # side of the upright picture that corrects a slant
ENDS = 0.02  # share of the ink left out at either side when width is measured
EMPTY = 1e-3  # mean ink of a picture without a letter, at most: nothing is measured of it
EXPECTED = Path(__file__).parent / "rulers.npz"


class Expected(NamedTuple):
    """Hold what is expected of each of the 62 letters."""

    lean: Tensor  # (62,), slope of ink's columns on its rows when upright, median
    picture: Tensor  # (62, 256), mean of the upright pictures at half the resolution
    correction: Tensor  # (62, 256), by which what differs from it moves the slope
    offset: Tensor  # (62,)
    width: Tensor  # (62,), in cap heights, geometric mean


@lru_cache
def expected() -> Expected:
    """Read what is expected of each letter."""
    with np.load(EXPECTED) as arrays:
        return Expected(*(torch.from_numpy(arrays[name].astype(np.float32)) for name in Expected._fields))


def sheared(paper: Tensor, by: Tensor) -> Tensor:
    """Shear ink (n, 32, 32) to the right by slopes (n,) about its centre, and put that in the middle of the width."""
    centre = moments(paper)
    up, right = torch.meshgrid(-torch.arange(SIDE).to(paper), torch.arange(SIDE).to(paper), indexing="ij")
    columns = right - (SIDE - 1) / 2 + centre.right[:, None, None] - by[:, None, None] * (up - centre.up[:, None, None])
    grid = torch.stack([(2 * columns + 1) / SIDE - 1, ((1 - 2 * up) / SIDE - 1).expand(len(paper), -1, -1)], dim=-1)
    return F.grid_sample(paper.unsqueeze(1), grid, align_corners=False).squeeze(1)


def reduced(paper: Tensor) -> Tensor:
    """Return ink (n, 32, 32) at half the resolution, as rows (n, 256)."""
    return F.avg_pool2d(paper.unsqueeze(1), 2).flatten(1)


def leaning(paper: Tensor, c: Tensor) -> Tensor:
    """Return by how much ink (n, 32, 32) leans more than its letter does when upright, as a slope (n,).

    The picture is sheared back by its own slope; what is left depends on its shape alone and corrects the slope, so
    that a shear of the picture is added to the reading as it is.
    """
    of = expected()
    lean = moments(paper).slope - of.lean[c]
    left = reduced(sheared(paper, -lean)) - of.picture[c]
    return lean - (left * of.correction[c]).sum(1) - of.offset[c]


def extent(paper: Tensor) -> Tensor:
    """Return the width (n,) of ink (n, 32, 32) in pixels, but for the outermost ENDS of it on either side."""
    columns = paper.sum(1)
    share = F.pad((columns / columns.sum(1, keepdim=True).clamp(min=1e-6)).cumsum(1), (1, 0)).numpy()
    borders = np.arange(SIDE + 1)
    return torch.tensor([np.subtract(*np.interp([1 - ENDS, ENDS], row, borders)) for row in share]).to(paper)


def missing_where_empty(values: Tensor, paper: Tensor) -> Tensor:
    """Return values (n,), NaN where there is no ink."""
    return torch.where(paper.mean((1, 2)) > EMPTY, values, torch.nan)


def paper_of(x: Tensor) -> Tensor:
    """Return the ink (n, 32, 32), 0 … 1, of x (n, C, 32, 32) in [−1, 1]; refuse pictures of another size."""
    if x.shape[2:] != (SIDE, SIDE):
        got = " × ".join(map(str, x.shape[2:]))
        raise ValueError(f"letters are measured on {SIDE} × {SIDE} pixels, got {got}. Resize the pictures.")
    return on_paper(x.detach().cpu()).mean(1)


def stroke(ink: np.ndarray) -> float:
    """Return the mean stroke width in pixels of one picture of ink (32, 32), by the distance to the paper.

    Twice the distance of a ridge to the paper is the width there. A stroke thinner than a pixel is grey: its width is
    that share of a pixel.
    """
    from scipy import ndimage

    if ink.max() < 0.05:
        return float("nan")
    fine = ndimage.zoom(ink, FINER, order=1, mode="nearest", grid_mode=True)
    nearby = ndimage.maximum_filter(fine, 2 * FINER + 1)  # a hairline beside a stem is compared with itself
    distance = ndimage.distance_transform_edt(np.pad(fine > np.maximum(nearby / 2, 0.02), 1))[1:-1, 1:-1]
    ridge = (distance == ndimage.maximum_filter(distance, 3)) & (distance > 0)
    return float(np.mean((2 * distance[ridge] - 1) * np.minimum(1, nearby[ridge])) / FINER)


def weight(x: Tensor, c: Tensor | None = None) -> Tensor:
    """Return the stroke width (n,) in cap heights of letters x (n, C, 32, 32) in [−1, 1]; c makes no difference."""
    return torch.tensor([stroke(ink) for ink in paper_of(x).numpy()], dtype=torch.float32) / CAP


def slant(x: Tensor, c: Tensor) -> Tensor:
    """Return the angle (n,) in degrees by which letters c (n,) in x (n, C, 32, 32) lean to the right."""
    paper = paper_of(x)
    return missing_where_empty(leaning(paper, c).atan().rad2deg(), paper)


def width(x: Tensor, c: Tensor) -> Tensor:
    """Return the width (n,) of letters c (n,) in x (n, C, 32, 32), over what is usual for the letter.

    It is measured with the letter sheared upright.
    """
    paper = paper_of(x)
    upright = sheared(paper, -leaning(paper, c))
    return missing_where_empty(extent(upright) / CAP / expected().width[c], paper)
