"""Read the labelled letters that the demos on the embedded letters are trained on, and set these demos up.

weight     y is the mean stroke width, a number in heights of a capital. The ruler that made the labels measures the
           samples too.
slant      y is the angle in degrees by which the letter leans to the right. The ruler that made the labels is told
           which letter a sample shows: an upright R leans by its shape.
serif      y is whether the font says that it has serifs. No ruler measures that: the judge that ships does, which was
           fitted on many families that none of the labelled sets has.
weight,slant,serif
           three controls from three datasets that share no font, on one letter, which has 162 combinations.

Every control has 500 letters of all kinds, and is trained on a few: the time of a demo grows with them. p̂ is of all, so
the letter is no condition of its data. Beside a ruler stands a judge, fitted on real letters of families that neither
the prior nor any labelled set has.
"""

from collections.abc import Iterable
from typing import Any

import torch

from ....data.labelled import LabelledImages
from ....data.letters.rulers import CHARACTERS
from ....data.letters.sets import LETTER, REAL, SERIF, SERIFS, SLANT, WEIGHT, Letters, letters
from ....evaluate.rulers.table import RULERS

SCALES = {WEIGHT: "letter-weight", SLANT: "letter-slant"}  # the ruler of each
FEW, ONE = "Rag", "R"  # the letters of a demo of one control, and of three
# of samples, which are most of a demo's time, about a third of the defaults'
BUDGET: dict[str, Any] = {
    "steps": 20,
    "learners": ["contrast"],
    "contrast": {"updates": 2000, "cache": 1000},
    "evaluation": {"prior_samples": 1000},
}
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"name": name, "kind": "scale", "ruler": ruler} for name, ruler in SCALES.items()},
    SERIF: {"name": SERIF, "ruler": "letter-serif"},
}


def settings_on(letters: str, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of a demo on a few letters."""
    return {
        "prior": "letters",
        "classes": [CHARACTERS.index(letter) for letter in letters],
        "controls": list(rows),
        **BUDGET,
    }


SETTINGS: dict[str, dict[str, Any]] = {
    **{name: settings_on(FEW, [row]) for name, row in ROWS.items()},
    ",".join(ROWS): settings_on(ONE, ROWS.values()),
}


def labelled_letters(
    controls: str, seed: int, labels: int | None = None
) -> list[tuple[LabelledImages, LabelledImages | None]]:
    """Return the dataset of each control of a demo and, of a scale, real letters of other families for a judge.

    Of `labels` letters, all if None, they are drawn by the seed.
    """
    datasets = []
    for settings in SETTINGS[controls]["controls"]:
        rows = letters(name := settings["name"])
        if labels and labels > len(rows.x):
            raise ValueError(f"--labels {labels}: {name} has {len(rows.x)} labelled letters. Ask for no more.")
        drawn = torch.randperm(len(rows.x), generator=torch.Generator().manual_seed(seed))[:labels].sort().values
        others = as_images(real_letters(name), name) if name in SCALES else None
        datasets.append((as_images(rows, name)[drawn], others))
    return datasets


def real_letters(name: str) -> Letters:
    """Return the real letters, with what the ruler of a scale reads as their labels."""
    real, measure = letters(REAL), RULERS[SCALES[name]].number
    assert measure is not None
    return real._replace(y=measure(real.x, real.c))


def as_images(rows: Letters, name: str) -> LabelledImages:
    """Return letters with a column of the letter, and one of y, numbers as texts."""
    texts = SERIFS if name == SERIF else tuple(f"{y:.6g}" for y in rows.y.tolist())
    y = rows.y if name == SERIF else torch.arange(len(rows.y))
    return LabelledImages(rows.x, {LETTER: rows.c, name: y}, {LETTER: tuple(CHARACTERS), name: texts})
