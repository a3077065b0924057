"""Name the built-in rulers: what each measures, of which pictures, and by which function.

A new ruler is a function of pictures x (n, C, H, W) in [−1, 1] and of the class c (n,) of each, and one row of RULERS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...data import digits
from ...data.digits import INK, SLANT, VALUES
from ...data.labels import LabelSpace
from ...data.letters import rulers as letters
from ...data.letters.rulers import CHARACTERS, SIDE
from ...data.letters.sets import SERIFS
from ...data.names import key_of
from .serif import serif

Measure = Callable[..., Tensor]  # of (x, c)


@dataclass(frozen=True)
class Ruler:
    """Measure the y of pictures, by the rule that made the labels or by a judge that ships.

    Args:
        measures: what, in words.
        number: x (n, C, H, W), c (n,) → y (n,) as a number, NaN where nothing can be measured; None if y is a class.
        label: x, c → y (n,) as a class, NULL where nothing can be measured; None if y is a number.
        values: the classes, in order.
        side: height and width of the pictures in pixels; None for any.
        subjects: what a picture may show, as the functions number c; none where c makes no difference.
        by: "ruler", or "judge" if it is a classifier, which may err.
    """

    measures: str
    number: Measure | None = None
    label: Measure | None = None
    values: tuple[str, ...] = ()
    side: int | None = None
    subjects: tuple[str, ...] = ()
    by: Literal["ruler", "judge"] = "ruler"

    def translated(self, c: Tensor | None, names: Sequence[str]) -> Tensor | None:
        """Return the prior's classes c (n,), called by `names`, as the functions number them."""
        if not self.subjects:
            return c
        if c is None:
            raise ValueError("this ruler needs to know what each picture shows. Give c.")
        number_of = {subject: i for i, subject in enumerate(self.subjects)}
        return torch.tensor([number_of[names[i]] for i in c.tolist()])

    def refusal(
        self, control: str, space: LabelSpace, shape: Sequence[int] | None, names: Sequence[str] | None
    ) -> str | None:
        """Say why it cannot measure a control's y on images (C, H, W) of a prior's classes by name; None if it can.

        Of no prior both are None, and nothing is asked of it.
        """
        same = self.number if space.scale else list(map(key_of, space.values)) == list(map(key_of, self.values))
        if not same:
            kinds = [f"the classes {', '.join(self.values)}"] if self.values else []
            kinds += ["a number"] if self.number else []
            return f"measures {' or '.join(kinds)}, not the {'numbers' if space.scale else 'classes'} of {control!r}"
        if shape is not None and self.side and tuple(shape[1:]) != (self.side, self.side):
            return f"measures {self.side} × {self.side} pixels, and this prior makes {shape[1]} × {shape[2]}"
        if names is not None and self.subjects and not (names and set(names) <= set(self.subjects)):
            got = f"has the classes {', '.join(map(repr, names[:3]))} …" if names else "is given no c"
            return f"needs to know which of {self.subjects[0]} … {self.subjects[-1]} is shown, and this prior {got}"
        return None


RULERS = {
    INK: Ruler(
        "the mean pixel, 0 black to 1 white, on pictures of any size; in classes, 1 to 4, by the quartiles of "
        "scikit-learn's digits",
        digits.ink, digits.ink_ruler, VALUES[INK],
    ),
    SLANT: Ruler(
        "the slope of the ink, in pixels to the right per pixel up, on pictures of any size; in classes, left and "
        "right of the median of scikit-learn's digits",
        digits.slant, digits.slant_ruler, VALUES[SLANT],
    ),
    "letter-weight": Ruler(
        "the mean stroke width of a letter, in heights of a capital", letters.weight, side=SIDE,
    ),
    "letter-slant": Ruler(
        "the angle, in degrees, by which a letter leans to the right more than it does in upright faces",
        letters.slant, side=SIDE, subjects=tuple(CHARACTERS),
    ),
    "letter-width": Ruler(
        "the width of a letter, sheared upright, over what is usual for that letter",
        letters.width, side=SIDE, subjects=tuple(CHARACTERS),
    ),
    "letter-serif": Ruler(
        "sans or serif, as a classifier sees it that ships: a judge, right on 89 % of letters of families it was not "
        "fitted on",
        None, serif, SERIFS, SIDE, tuple(CHARACTERS), "judge",
    ),
}  # fmt: skip


def checked_ruler(name: str) -> str:
    """Return the name of a ruler; refuse (ValueError) another."""
    if name not in RULERS:
        raise ValueError(f"must be one of {', '.join(RULERS)}")
    return name
