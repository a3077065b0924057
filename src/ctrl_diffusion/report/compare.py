"""Report a comparison of methods."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .style import CTRL, STYLE, embedded, headline, plain_ticks, render

METHODS = {  # colour and marker of each in a comparison
    "ctrl": (CTRL, "o"), "classifier-guidance": ("#c2661c", "s"), "free-guidance": ("#2a8c5a", "^"),
    "dps": ("#8a5aa8", "D"), "mpgd": ("#c04a6b", "v"), "tds": ("#555", "P"), "feynman-kac": ("#888", "X"),
    "importance": ("#aaa", "p"), "best-of": ("#b59a2c", "h"), "rejection": ("#222", "*"),
}  # fmt: skip
Averaged = Sequence[dict[str, Any]]  # rows of `compare.averaged`


def with_error(axes: Axes, x: Sequence[tuple], y: Sequence[tuple], method: str, **look: Any) -> None:
    """A line through (mean, half the interval) in both directions, in a method's colours."""
    colour, marker = METHODS[method]
    bars = {name: None if None in (e := [half for _, half in v]) else e for name, v in (("xerr", x), ("yerr", y))}
    look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "elinewidth": 0.6, **look}
    axes.errorbar([mean for mean, _ in x], [mean for mean, _ in y], **bars, **look)


def pareto_figure(rows: Averaged, prior: dict[str, Any], target: float, labels: int) -> Figure:
    """Accuracy against diversity and against the distance to real x as each method is turned, at one number of labels.

    Args:
        rows: of the comparison.
        prior: its own figures.
        target: accuracy of an exact sampler with the same p̂.
        labels: how many.
    """
    mine = [row for row in rows if row["labels"] == labels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, figure_of in zip(panels, ("diversity_ratio", "frechet"), strict=True):
            for method in METHODS:
                turned = [row for row in mine if row["method"] == method]
                if turned:
                    x, y = [row[figure_of] for row in turned], [row["accuracy"] for row in turned]
                    with_error(axes, x, y, method, label=turned[0]["title"], zorder=3 if method == "ctrl" else 2)
                    best = [row for row in turned if row["chosen"]]
                    at = [row[figure_of][0] for row in best], [row["accuracy"][0] for row in best]
                    axes.scatter(*at, s=70, facecolors="none", edgecolors=METHODS[method][0], linewidths=1.2, zorder=4)
            axes.scatter(
                prior[figure_of], prior["accuracy"], color="#333", marker="+", s=60, label="the prior, not asked"
            )
            axes.axhline(target, color=CTRL, linewidth=0.8, linestyle="--", zorder=0, label="exact sampler, same p̂")
        panels[1].set_xscale("log")
        plain_ticks(panels[1].xaxis)
        panels[0].set(xlabel="diversity (1: the prior’s, among what has y)", ylabel="y as asked")
        panels[1].set(xlabel="Fréchet distance to real x with that y (left is better)")
        headline(panels[0], f"Accuracy and diversity, {labels} labels (ring: chosen)")
        headline(panels[1], "Accuracy and fidelity")
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def labels_figure(rows: Averaged, prior: dict[str, Any], targets: dict[int, float]) -> Figure:
    """Accuracy of each method, at its chosen setting, against the number of labels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for method in METHODS:
            mine = sorted((r for r in rows if r["method"] == method and r["chosen"]), key=lambda r: r["labels"])
            if mine:
                x, y = [(row["labels"], 0.0) for row in mine], [row["accuracy"] for row in mine]
                with_error(axes, x, y, method, label=mine[0]["title"], zorder=3 if method == "ctrl" else 2)
        axes.plot(
            targets.keys(), targets.values(), color=CTRL, linewidth=0.8, linestyle="--", label="exact sampler, same p̂"
        )
        axes.axhline(prior["accuracy"], color="#999", linewidth=0.8, linestyle=":", label="the prior, not asked")
        axes.set_xscale("log")
        ticks = sorted(targets)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="labels, of each control", ylabel="y as asked", ylim=(0, 1))
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        headline(axes, "Accuracy and labels")
    return figure


def write_compare_report(folder: Path, rows: Averaged, found: dict[str, Any], command: str, version: str) -> None:
    """Write pareto.png, labels.png (of several numbers of labels) and a report.html about a comparison.

    Args:
        folder: to write into.
        rows: means over seeds.
        found: the contents of compare.json.
        command: what was typed.
        version: of this package.
    """
    counts = sorted({row["labels"] for row in rows})
    cells = found["cells"]
    targets = {n: float(np.mean([cell["target_accuracy"] for cell in cells if cell["labels"] == n])) for n in counts}
    most = counts[-1]
    figures = {"pareto": pareto_figure(rows, found["prior"], targets[most], most)}
    if len(counts) > 1:
        figures["labels"] = labels_figure(rows, found["prior"], targets)
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in figures.items()}
    render(
        folder / "report.html", "compare.html", images=images, rows=rows, found=found, targets=targets,
        command=command, version=version,
    )  # fmt: skip
