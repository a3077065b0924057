"""Draw in one style, and embed pictures in pages."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from ..data.labelled import to_pixels
from ..system.files import atomic, write_text

CTRL, QUIET = "#0b62a4", "#c9ced6"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#666", "figure.dpi": 160, "text.parse_math": False,
}  # fmt: skip


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG whole, without the program's name and the time, so that equal pictures are equal bytes."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None}, bbox_inches="tight", facecolor="white")


def show_grid(axes: Axes, x: Tensor, rows: int, row_names: list[str], column_names: list[str], title: str) -> None:
    """Draw images x (rows · columns, C, H, W), row by row, with thin white gaps."""
    pixels = to_pixels(x)
    pixels = pixels.reshape(rows, -1, *pixels.shape[1:])
    columns, height, width = pixels.shape[1:4]
    gap = max(1, height // 8)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, *pixels.shape[4:]), 255, np.uint8)
    for i in range(rows):
        for j in range(columns):
            top, left = i * (height + gap), j * (width + gap)
            canvas[top : top + height, left : left + width] = pixels[i, j]
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([j * (width + gap) + width / 2 for j in range(columns)], column_names)
    axes.set_yticks([i * (height + gap) + height / 2 for i in range(rows)], row_names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    headline(axes, title)


def shortened(text: str, most: int = 12) -> str:
    """Shorten a label to fit an axis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def stacked(text: str, lines: int = 2, most: int = 8) -> str:
    """Put the words of a label below each other, the last line shortened, to fit a narrow column."""
    words = text.split()
    rows = [*words[: lines - 1], *([" ".join(words[lines - 1 :])] if words[lines - 1 :] else [])]
    return "\n".join(shortened(row, most) for row in rows)


def distinct_endings(names: Sequence[str]) -> list[str]:
    """Leave out the words that all names begin with, as prompts do: an axis has room for few."""
    words = [name.split() for name in names]
    shared = next((i for i, column in enumerate(zip(*words, strict=False)) if len(set(column)) > 1), 0)
    return [" ".join(row[shared:]) for row in words]


def headline(axes: Axes, text: str) -> None:
    """Set the title of axes, bold and to the left."""
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")


def sheet_figure(x: Tensor, columns: int = 8) -> Figure:
    """Draw all samples x (n, C, H, W) in one picture, row by row."""
    rows = -(-len(x) // columns)
    blank = torch.ones(rows * columns - len(x), *x.shape[1:])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 * columns, 0.6 * rows), layout="constrained")
        show_grid(figure.subplots(), torch.cat([x, blank]), rows, [""] * rows, [""] * columns, "")
    return figure


def plain_ticks(*axes: Axis) -> None:
    """Label logarithmic axes with plain numbers, a few to each power of ten."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def embedded(path: Path, figure: Figure) -> str:
    """Write the figure as a PNG, and return it as text for a page."""
    save_figure(path, figure)
    return base64.b64encode(path.read_bytes()).decode()


def render(path: Path, template: str, **content: Any) -> None:
    """Write a page from a template."""
    environment = Environment(loader=PackageLoader(__package__), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template(template).render(**content))
