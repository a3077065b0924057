"""Label images by a function of the image itself: `--control NAME:MODULE:FUNCTION`.

The function is given one PIL image as the prior sees it, after conversion and resizing, so that it labels samples as it
labels data. It returns a text or a number, or None for no label. Its module is installed, or lies where the command
runs.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, cast

from PIL import Image

Rule = Callable[[Image.Image], Any]
KILOBYTES = (60.0, 85.0, 110.0)  # where the reference code of the paper cuts (Zhao et al. 2025, arXiv 2406.12120)


def function_of(name: str) -> Any:
    """Import what MODULE:FUNCTION names, None if the module lacks it; raise whatever importing raises."""
    module, _, function = name.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides an installed module
    return getattr(import_module(module), function, None)


def load_rule(name: str) -> Rule:
    """Import the function that MODULE:FUNCTION names; refuse (ValueError) a name that cannot be imported."""
    module, _, function = name.rpartition(":")
    try:
        rule = function_of(name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(f"the rule {name}: {type(error).__name__}: {error}. Name it MODULE:FUNCTION.") from error
    if not callable(rule):
        raise ValueError(f"the rule {name}: {module} has no function {function!r}. Name it MODULE:FUNCTION.")
    return cast(Rule, rule)


def jpeg_kilobytes(image: Image.Image, quality: int = 95) -> float:
    """Return the size of the image as a JPEG file in kilobytes of 1,000 bytes."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return len(file.getvalue()) / 1000


def jpeg_size(image: Image.Image, cuts: Sequence[float] = KILOBYTES) -> int:
    """Return the paper's compressibility, 0 … 3: 3 up to 60 kB as a JPEG, 2 up to 85, 1 up to 110, 0 beyond.

    Its cuts are meant for 512 × 512 pixels; smaller images need others.
    """
    return sum(jpeg_kilobytes(image) <= cut for cut in cuts)
