"""Draw the labelled digits that the demos on the embedded digits are trained on, and set these demos up.

ink        y is the stroke weight, the mean pixel from 0 (black) to 1, in four classes of equal size, named 1 (light)
           … 4 (heavy), for each of the prior's ten digits. The ruler that made the labels measures the samples too.
digit      y is the digit, and the prior is used by its null class. A judge fitted on other digits measures y.
ink,slant  two controls from two datasets that share no image; that of slant has no digit. Slant is whether the strokes
           lean left or right of the median, on eight digits: a 6 leans left and a 7 right by its shape.
"""

from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from ....data.digits import DIGIT, INK, SLANT, UPRIGHT, VALUES, digits, ink_ruler, slant_ruler
from ....data.labelled import LabelledImages

# ink depends on neither place nor orientation, and its classes are ordered
INK_CLASSIFIER = {"head": "ordinal", "grid": 1, "depth": 1, "augment": "any_side_up", "updates": 8800}
INK_CONTROL = {"name": INK, "condition": DIGIT, "ruler": INK, "interval": "none", "classifier": INK_CLASSIFIER}
# ink is decided at the end of the chain: its control has no use for an interval, nor its chain for a focus; the figures
# of all demos in the docs were measured without
EVERYWHERE = {"focus": "none", "patience": None, "learners": ["weighted", "adjoint"]}
RENOISED = {"updates": 700, "renoising": 175}
# few updates: 250 labels leave too few to calibrate a classifier that is fitted until it is overconfident
SLANT_CLASSIFIER = {"head": "categorical", "grid": 4, "depth": 1, "augment": "half_turn", "updates": 500}
SETTINGS: dict[str, dict[str, Any]] = {
    "ink": {"prior": "digits", "controls": [INK_CONTROL], "weighted": RENOISED, **EVERYWHERE},
    "digit": {
        "prior": "digits",
        "unconditional": True,
        # the names are numbers, but not in an order; digits differ in where the strokes are
        "controls": [{"name": DIGIT, "interval": "none", "classifier": {"head": "categorical", "grid": 4, "depth": 2}}],
        # ten classes share the samples of the one condition
        "weighted": {"cache": 4000, "updates": 600, "renoising": 150},
        **EVERYWHERE,
        "adjoint": {"updates": 900},
        "evaluation": {"prior_samples": 4000, "paths": 2000},
    },
    "ink,slant": {
        "prior": "digits",
        "classes": list(UPRIGHT),
        "controls": [
            INK_CONTROL,
            {"name": SLANT, "ruler": SLANT, "interval": "none", "classifier": SLANT_CLASSIFIER},
        ],
        # eight combinations share the samples of a digit, the rarest one in a hundred
        "weighted": {"cache": 4000, **RENOISED},
        **EVERYWHERE,
        "adjoint": {"updates": 1200},
        "evaluation": {"prior_samples": 4000, "paths": 2000},
    },
}
LABELLED = {"ink": 500, "digit": 200, "ink,slant": 250}  # for each control
JUDGED = 200  # digits for the judge, at least


def labelled_digits(controls: str, seed: int, labels: int | None = None) -> list[tuple[LabelledImages, LabelledImages]]:
    """Draw a dataset for each control of a demo, evenly over its classes, and one of the other digits for its judge.

    The controls share no image with each other or with the judges; each has `labels` images (None: the demo's default).
    """
    x, c = digits()
    measured = {DIGIT: c, INK: ink_ruler(x), SLANT: slant_ruler(x)}
    usable = torch.isin(c, torch.tensor(SETTINGS[controls].get("classes", range(10))))
    rest, parts = usable.nonzero().squeeze(1).numpy(), []
    count = labels or LABELLED[controls]
    if (most := (len(rest) - JUDGED) // len(SETTINGS[controls]["controls"])) < count:
        raise ValueError(f"--labels {count}: of {len(rest)} digits {JUDGED} are for the judge. Ask for {most} at most.")
    for settings in SETTINGS[controls]["controls"]:
        y = measured[settings["name"]]
        rows, rest = train_test_split(rest, train_size=count, stratify=y[rest].numpy(), random_state=seed)
        parts.append(rows)

    def labelled(settings: dict[str, Any], rows: np.ndarray) -> LabelledImages:
        labels = {name: y for name, y in measured.items() if name in (settings["name"], settings.get("condition"))}
        return LabelledImages(x, labels, {name: VALUES[name] for name in labels})[rows]

    controls_parts = zip(SETTINGS[controls]["controls"], parts, strict=True)
    return [(labelled(settings, rows), labelled(settings, rest)) for settings, rows in controls_parts]
