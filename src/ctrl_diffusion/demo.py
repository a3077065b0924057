"""The demo's material: scikit-learn's digits, the ink ruler, the offline dataset and the settings.

The control y is *ink*, the stroke weight: the mean pixel on a scale from 0 (black) to 1, in four even classes cut at
the quartiles of the real digits and named 1 (light) … 4 (heavy). The true ink of any sample is measured by the ruler
that made the labels, not by a network.
"""

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from .assets.build_digits import digits
from .data import LabelledImages

CONDITION = ("digit", tuple("0123456789"))
CONTROL = ("ink", tuple("1234"))
VALUES = dict([CONDITION, CONTROL])
LABELLED = 500
# ink does not care where it is nor which side is up, and its classes are ordered
SETTINGS = {
    "prior": "digits",
    "control": CONTROL[0],
    "condition": CONDITION[0],
    "ruler": "ink",
    "classifier": {"head": "ordinal", "grid": 1, "depth": 1, "augment": "any_side_up", "updates": 8800},
}


def ink(x: Tensor) -> Tensor:
    """Mean pixel on the scale 0 … 1: (n,) of x (n, C, H, W) in [−1, 1]; values outside are clipped, as in a file."""
    return (x.clamp(-1, 1).flatten(1).mean(1) + 1) / 2


def ink_ruler(x: Tensor) -> Tensor:
    """The true ink class 0 … 3 (n,) of x (n, C, H, W)."""
    cuts = torch.quantile(ink(digits()[0]), torch.tensor([0.25, 0.5, 0.75]))
    return torch.bucketize(ink(x), cuts, right=True)


def offline_dataset(seed: int) -> LabelledImages:
    """500 real digits with their class and their ink, drawn evenly over the ink classes."""
    x, c = digits()
    y = ink_ruler(x)
    rows, _ = train_test_split(torch.arange(len(x)).numpy(), train_size=LABELLED, stratify=y.numpy(), random_state=seed)
    return LabelledImages(x, {CONDITION[0]: c, CONTROL[0]: y}, VALUES)[rows]
