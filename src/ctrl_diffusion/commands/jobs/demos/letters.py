"""Read the labelled letters that the demos on the embedded letters are trained on, and set these demos up.

weight     y is the mean stroke width, a number in heights of a capital, for each of the letters. The ruler that made
           the labels measures the samples too.
slant      y is the angle in degrees by which the letter leans to the right. The ruler that made the labels is told
           which letter a sample shows: an upright R leans by its shape.
serif      y is whether the font says that it has serifs. No ruler measures that: the judge that ships does, which was
           fitted on many families that none of the labelled sets has.
weight,slant,serif
           three controls from three datasets that share no font, on a few letters: each of these has 162 combinations.
           p̂ is fitted on all letters, so that the data need not say which one a picture shows.

Every control has 500 letters. Beside a ruler stands a judge, fitted on real letters of families that neither the prior
nor any labelled set has.
"""

from typing import Any

import torch

from ....data.labelled import LabelledImages
from ....data.letters.rulers import CHARACTERS
from ....data.letters.sets import LETTER, REAL, SERIF, SERIFS, SLANT, WEIGHT, Letters, letters
from ....evaluate.rulers.table import RULERS

SCALES = {WEIGHT: "letter-weight", SLANT: "letter-slant"}  # the ruler of each
FEW = "Hand"  # the letters of the demo of three controls
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"name": name, "kind": "scale", "ruler": ruler} for name, ruler in SCALES.items()},
    SERIF: {"name": SERIF, "ruler": "letter-serif"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"prior": "letters", "controls": [{**row, "condition": LETTER}]} for name, row in ROWS.items()},
    ",".join(ROWS): {
        "prior": "letters",
        "classes": [CHARACTERS.index(letter) for letter in FEW],
        "controls": list(ROWS.values()),
    },
}


def labelled_letters(
    controls: str, seed: int, labels: int | None = None
) -> list[tuple[LabelledImages, LabelledImages | None]]:
    """Return the dataset of each control of a demo and, of a scale, real letters of other families for a judge.

    Of `labels` letters, all if None, they are drawn by the seed.
    """
    datasets = []
    for settings in SETTINGS[controls]["controls"]:
        name, condition = settings["name"], settings.get("condition")
        rows = letters(name)
        if labels and labels > len(rows.x):
            raise ValueError(f"--labels {labels}: {name} has {len(rows.x)} labelled letters. Ask for no more.")
        drawn = torch.randperm(len(rows.x), generator=torch.Generator().manual_seed(seed))[:labels].sort().values
        others = as_images(real_letters(name), name, condition) if name in SCALES else None
        datasets.append((as_images(rows, name, condition)[drawn], others))
    return datasets


def real_letters(name: str) -> Letters:
    """Return the real letters, with what the ruler of a scale reads as their labels."""
    real, measure = letters(REAL), RULERS[SCALES[name]].number
    assert measure is not None
    return real._replace(y=measure(real.x, real.c))


def as_images(rows: Letters, name: str, condition: str | None) -> LabelledImages:
    """Return letters with a column of y, numbers as texts, and one of the letter where there is a condition."""
    texts = SERIFS if name == SERIF else tuple(f"{y:.6g}" for y in rows.y.tolist())
    y = rows.y if name == SERIF else torch.arange(len(rows.y))
    column = {condition: rows.c} if condition else {}
    return LabelledImages(rows.x, {**column, name: y}, {**dict.fromkeys(column, tuple(CHARACTERS)), name: texts})
