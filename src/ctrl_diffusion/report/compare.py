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

STYLES = {  # colour and marker of each method
    "ctrl": (CTRL, "o"), "classifier-guidance": ("#c2661c", "s"), "free-guidance": ("#2a8c5a", "^"),
    "dps": ("#8a5aa8", "D"), "mpgd": ("#c04a6b", "v"), "tds": ("#555", "P"), "feynman-kac": ("#888", "X"),
    "importance": ("#aaa", "p"), "best-of": ("#b59a2c", "h"), "rejection": ("#222", "*"),
}  # fmt: skip
OTHER = ("#7a6a4f", "<")  # of a method from outside the package
Rows = Sequence[dict[str, Any]]  # averaged over seeds


def plot_with_error(axes: Axes, x: Sequence[tuple], y: Sequence[tuple], method: str, **style: Any) -> None:
    """Plot a line through (mean, half the interval) in both directions, in a method's style."""
    colour, marker = STYLES.get(method, OTHER)
    bars = {name: None if None in (e := [half for _, half in v]) else e for name, v in (("xerr", x), ("yerr", y))}
    style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "elinewidth": 0.6, **style}
    axes.errorbar([mean for mean, _ in x], [mean for mean, _ in y], **bars, **style)


def by_method(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Group rows by method, in the order of STYLES."""
    methods = [*STYLES, *dict.fromkeys(row["method"] for row in rows if row["method"] not in STYLES)]
    groups = {method: [row for row in rows if row["method"] == method] for method in methods}
    return {method: group for method, group in groups.items() if group}


def pareto_figure(
    rows: Rows, prior: dict[str, Any], target: float, labels: int, real: dict[str, Any] | None = None
) -> Figure:
    """Plot accuracy against diversity and against the distance to real x, over each method's settings.

    The rows are those of one number of labels; `target` is the accuracy of an exact sampler with the same p̂, and `real`
    has the figures of real x.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, ("diversity_ratio", "frechet"), strict=True):
            for method, group in by_method([row for row in rows if name in row]).items():
                x, y = [row[name] for row in group], [row["accuracy"] for row in group]
                plot_with_error(axes, x, y, method, label=group[0]["title"], zorder=3 if method == "ctrl" else 2)
                best = [(row[name][0], row["accuracy"][0]) for row in group if row["chosen"]]
                ring = {"edgecolors": STYLES.get(method, OTHER)[0], "linewidths": 1.2, "zorder": 4}
                axes.scatter([a for a, _ in best], [b for _, b in best], s=70, facecolors="none", **ring)
            cross = {"color": "#333", "marker": "+", "s": 60}
            if prior[name] is not None:
                axes.scatter(prior[name], prior["accuracy"], **cross, label="the prior, not asked")
            if real and real[name] is not None:
                axes.axvline(real[name], color="#999", linewidth=0.8, linestyle=":", zorder=0, label="real data")
            axes.axhline(target, color=CTRL, linewidth=0.8, linestyle="--", zorder=0, label="exact sampler, same p̂")
        panels[1].set_xscale("log")
        plain_ticks(panels[1].xaxis)
        panels[0].set(xlabel="diversity (1: the prior’s, among what has y)", ylabel="accuracy")
        panels[1].set(xlabel="Fréchet distance to real x with that y (left is better)")
        headline(panels[0], f"Accuracy and diversity, {labels} labels (ring: chosen)")
        headline(panels[1], "Accuracy and fidelity")
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def labels_figure(rows: Rows, prior: dict[str, Any], targets: dict[int, float]) -> Figure:
    """Plot the accuracy of each method, at its chosen setting, against the number of labels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for method, group in by_method([row for row in rows if row["chosen"]]).items():
            group.sort(key=lambda row: row["labels"])
            x, y = [(row["labels"], 0.0) for row in group], [row["accuracy"] for row in group]
            plot_with_error(axes, x, y, method, label=group[0]["title"], zorder=3 if method == "ctrl" else 2)
        dashed = {"color": CTRL, "linewidth": 0.8, "linestyle": "--"}
        axes.plot(targets.keys(), targets.values(), **dashed, label="exact sampler, same p̂")
        axes.axhline(prior["accuracy"], color="#999", linewidth=0.8, linestyle=":", label="the prior, not asked")
        axes.set_xscale("log")
        axes.set_xticks([*targets], [str(n) for n in targets])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="labels, of each control", ylabel="accuracy", ylim=(0, 1))
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        headline(axes, "Accuracy and labels")
    return figure


def write_compare_report(folder: Path, rows: Rows, result: dict[str, Any], command: str, version: str) -> None:
    """Write pareto.png, labels.png (of several numbers of labels) and a report.html from rows and compare.json."""
    counts, cells = sorted({row["labels"] for row in rows}), result["cells"]
    known = {
        n: [c["target_accuracy"] for c in cells if c["labels"] == n and c["target_accuracy"] is not None]
        for n in counts
    }
    targets = {n: float(np.mean(each)) if each else float("nan") for n, each in known.items()}  # of a rare y not known
    at_most = [row for row in rows if row["labels"] == counts[-1]]
    arguments = at_most, result["prior"], targets[counts[-1]], counts[-1], result["real"]
    figures = {"pareto": pareto_figure(*arguments)}
    if len(counts) > 1:
        figures["labels"] = labels_figure(rows, result["prior"], targets)
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in figures.items()}
    render(
        folder / "report.html", "compare.html", images=images, rows=rows, result=result, targets=targets,
        command=command, version=version,
    )  # fmt: skip
