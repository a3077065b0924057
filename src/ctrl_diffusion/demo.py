"""The demo's material: scikit-learn's digits, the ink ruler, the offline dataset and a reader of digits.

The control y is *ink*, the stroke weight: the mean pixel on a scale from 0 (black) to 1, in four even classes cut at
the quartiles of the real digits and named 1 (light) … 4 (heavy). The true ink of any sample is measured by the ruler
that made the labels, not by a network.
"""

from collections.abc import Callable

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from .assets.build_digits import digits, split
from .classifier import Classifier, fit_classifier
from .data import LabelledImages

CONDITION = ("digit", tuple("0123456789"))
CONTROL = ("ink", tuple("1234"))
VALUES = dict([CONDITION, CONTROL])
LABELLED = 500
READER_EPOCHS = 40


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


def any_side_up(x: Tensor) -> Tensor:
    """Random mirror images of x (n, C, n, n), which keep the ink: eight views of each of a few hundred digits."""
    for swap in (lambda a: a.flip(-1), lambda a: a.flip(-2), lambda a: a.transpose(-1, -2)):
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, swap(x), x)
    return x


def fit_reader(progress: Callable[[], None] | None = None) -> Classifier:
    """A reader of digits, always the same one: it judges whether c is still obeyed.

    Fitted on the real digits the prior was trained on; the other 300 measure it (bench/prior.py).
    """
    rows = torch.as_tensor(split()[0])
    x, c = (a[rows] for a in digits())
    recipe = {"epochs": READER_EPOCHS, "batch": 64, "lr": 3e-3, "weight_decay": 0.01}
    return fit_classifier(x, c, classes=10, grid=4, progress=progress, **recipe)
