"""Report how far a LoRA goes from its base: pictures of its KL and samples, and a page."""

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..evaluate.verdict import gap_line
from .run import grid_figure
from .style import CTRL, STYLE, distinct_endings, embedded, headline, render, shortened, stacked

LISTED = 20  # prompts in the picture


class Grid(NamedTuple):
    """Hold samples (rows · columns, C, H, W) of a base and of a LoRA from the same noise, a column for each c."""

    prior: Tensor
    lora: Tensor
    rows: int
    names: Sequence[str]  # of the columns


def steps_figure(steps: Sequence[dict[str, float]]) -> Figure:
    """Plot the KL of each step with its standard errors, and the sum up to it, from noise to data."""
    kl, error = (np.array([row[key] for row in steps]) for key in ("kl_nats", "kl_stderr"))
    x = np.arange(1, len(steps) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.bar(x, kl, yerr=2 * error, color=CTRL, width=0.8, error_kw={"linewidth": 0.8, "ecolor": "#333"})
        right.plot(x, kl.cumsum(), color=CTRL, marker="o", markersize=3, linewidth=1.2)
        shown = x[:: max(1, len(x) // 8)]
        for axes, title in ((left, "KL of each step (nats, ± 2 s.e.)"), (right, "KL up to a step (nats)")):
            axes.set_xticks(shown, [f"{steps[i - 1]['sigma']:.2g}" for i in shown])
            axes.set(xlabel="noise level σ at which the step begins", ylim=(0, None))
            headline(axes, title)
    return figure


def prompts_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Plot the KL of each condition with its standard errors, the largest first."""
    rows = sorted(rows, key=lambda row: -row["kl_nats"])[:LISTED]
    y = range(len(rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.22 * len(rows) + 0.8), layout="constrained")
        axes = figure.subplots()
        kl, error = ([row[key] for row in rows] for key in ("kl_nats", "kl_stderr"))
        axes.barh(y, kl, xerr=[2 * each for each in error], color=CTRL, height=0.7, error_kw={"linewidth": 0.8})
        axes.set_yticks(y, [shortened(row["name"].removeprefix("c = "), 44) for row in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, None))
        headline(axes, "KL by condition (nats, ± 2 s.e.)")
    return figure


def write_certify_report(folder: Path, figures: dict[str, Any], grid: Grid, command: str) -> None:
    """Write the pictures and a self-contained report.html of the figures of certify.json."""
    pictures = {"The base": grid.prior, "With the LoRA, same noise": grid.lora}
    columns = [stacked(name) for name in distinct_endings(grid.names)]
    drawings = {
        "grid": grid_figure(pictures, [""] * grid.rows, columns, ""),
        "steps": steps_figure(figures["kl_per_step"]),
    }
    if len(figures["kl_per_prompt"]) > 1:
        drawings["prompts"] = prompts_figure(figures["kl_per_prompt"])
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in drawings.items()}
    rows = [("this LoRA", 1, figures)] if "aim" in figures else []
    for row in figures.get("run", {}).get("rows", ()):
        rows.append(("the run", row["strength"], row))
    lines = [(name, strength, row, gap_line(row["certificate"])) for name, strength, row in rows]
    render(
        folder / "report.html", "certify.html", images=images, f=figures, rows=lines, listed=LISTED, command=command,
        name=Path(figures["lora"]["file"]).name, version=version("ctrl-diffusion"), share=most_steps(figures),
        digits=digits_of(figures.get("score_stderr")),
    )  # fmt: skip


def digits_of(error: float | None) -> int:
    """Return how many decimals show a score of some standard error: to two digits of the error, two to six."""
    return min(6, max(2, 1 - math.floor(math.log10(error)))) if error else 2


def most_steps(figures: dict[str, Any]) -> tuple[int, int] | None:
    """Return the fewest steps that have at least half of the KL, and of how many; None of a KL of 0."""
    kl = sorted((row["kl_nats"] for row in figures["kl_per_step"]), reverse=True)
    if not sum(kl):
        return None
    return int(np.searchsorted(np.cumsum(kl), sum(kl) / 2)) + 1, len(kl)
