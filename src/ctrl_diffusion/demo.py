"""The demos' material: scikit-learn's digits, the ink ruler, the offline datasets and the settings.

ink     y is the stroke weight: the mean pixel on a scale from 0 (black) to 1, in four even classes cut at the quartiles
        of the real digits and named 1 (light) … 4 (heavy), for each of the prior's ten digits. The true ink of any
        sample is measured by the ruler that made the labels, not by a network.
digit   y is the digit itself, and the prior never hears of it: it is asked for its null class. A judge fitted on other
        digits says what came out.
"""

from typing import Any

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from .assets.build_digits import digits
from .data import LabelledImages

CONDITION = ("digit", tuple("0123456789"))
CONTROL = ("ink", tuple("1234"))
VALUES = dict([CONDITION, CONTROL])
LABELLED = {"ink": 500, "digit": 200}
SETTINGS: dict[str, dict[str, Any]] = {
    "ink": {
        "prior": "digits",
        "control": "ink",
        "condition": "digit",
        "ruler": "ink",
        # ink does not care where it is nor which side is up, and its classes are ordered
        "classifier": {"head": "ordinal", "grid": 1, "depth": 1, "augment": "any_side_up", "updates": 8800},
    },
    "digit": {
        "prior": "digits",
        "unconditional": True,
        "control": "digit",
        # the names are numbers and yet in no order; what tells digits apart is where the strokes are
        "classifier": {"head": "categorical", "grid": 4, "depth": 2},
        # ten classes share the samples of the one condition
        "weighted": {"cache": 4000},
        "adjoint": {"updates": 900},
        "evaluation": {"prior_samples": 4000, "paths": 2000},
    },
}


def ink(x: Tensor) -> Tensor:
    """Mean pixel on the scale 0 … 1: (n,) of x (n, C, H, W) in [−1, 1]; values outside are clipped, as in a file."""
    return (x.clamp(-1, 1).flatten(1).mean(1) + 1) / 2


def ink_ruler(x: Tensor) -> Tensor:
    """The true ink class 0 … 3 (n,) of x (n, C, H, W)."""
    cuts = torch.quantile(ink(digits()[0]), torch.tensor([0.25, 0.5, 0.75]))
    return torch.bucketize(ink(x), cuts, right=True)


def labelled_digits(control: str, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The offline dataset of a demo, drawn evenly over the classes of its control, and all other digits."""
    x, c = digits()
    known = {CONDITION[0]: c, CONTROL[0]: ink_ruler(x)}
    labels = {name: y for name, y in known.items() if name in (control, SETTINGS[control].get("condition"))}
    data = LabelledImages(x, labels, {name: VALUES[name] for name in labels})
    parts = train_test_split(
        torch.arange(len(x)).numpy(), train_size=LABELLED[control], stratify=labels[control].numpy(), random_state=seed
    )
    return data[parts[0]], data[parts[1]]
