"""Read the labelled letters that ship with the package: three sets that share no font, and real letters to compare."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WEIGHT, SLANT, SERIF, LETTER = "weight", "slant", "serif", "letter"
SETS = (WEIGHT, SLANT, SERIF)
SERIFS = ("sans", "serif")  # the classes of serif, in order
REAL = "real"  # letters of families that neither the prior nor any set has
FILE, JUDGE = (Path(__file__).parent / name for name in ("sets.npz", "judge"))  # the letters; the judge of serif


class Letters(NamedTuple):
    """Hold pictures of letters, what they show, and the label of each."""

    x: Tensor  # (n, 1, 32, 32) in [−1, 1], ink bright
    c: Tensor  # (n,), the number of the letter in CHARACTERS
    y: Tensor  # (n,), a number on a scale as float, or a class; of real letters serif, −1 where the font is silent
    family: Tensor  # (n,), the number of its font family in bench/results/letters-fonts.json


@lru_cache
def arrays() -> dict[str, np.ndarray]:
    """Read the file of all sets."""
    with np.load(FILE) as stored:
        return dict(stored)


def letters(name: str) -> Letters:
    """Return the labelled letters of a set, or the "real" ones; refuse another name."""
    if name not in (*SETS, REAL):
        raise ValueError(f"the sets of letters are {', '.join(SETS)} and {REAL}; got {name!r}.")
    x, c, y, family = (torch.from_numpy(arrays()[f"{name}_{part}"]) for part in ("x", "c", "y", "family"))
    y = y.float() if y.is_floating_point() else y.long()
    return Letters(x.float().unsqueeze(1) / 127.5 - 1, c.long(), y, family.long())
