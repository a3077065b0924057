"""Report the testbed: plot densities, gaps and biases, and write the pages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from ..exact.bias import FLOOR, LEARNER, PLUG_IN
from ..exact.races import Picture
from ..exact.task import GROWING
from .style import CTRL, QUIET, STYLE, embedded, headline, plain_ticks, render

Rows = Sequence[dict[str, Any]]  # of exact.json or bias.json


def density_figure(pictures: Sequence[Picture]) -> Figure:
    """Plot samples of a trained policy over the density of the chain's target, a panel for each task."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
        panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for axes, picture in zip(panels, pictures, strict=False):
            inside = picture.axis.abs() <= 3
            axis, density = picture.axis[inside].numpy(), picture.density[inside][:, inside].numpy()
            axes.contourf(axis, axis, density.T, levels=np.linspace(0.03, 1, 9) * density.max(), cmap="Blues")
            axes.scatter(*picture.ends.T.numpy(), s=1.5, color="#c2661c", alpha=0.5, linewidths=0)
            axes.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3), xticks=[-2, 0, 2], yticks=[-2, 0, 2])
            headline(axes, picture.task.title)
        for axes in panels[len(pictures) :]:
            axes.remove()
    return figure


def gap_figure(rows: Rows) -> Figure:
    """Plot the certificate's gap against the true KL where that is known: no point may lie right of the line."""
    rows = [row for row in rows if row["gap_nats"] is not None and (row["true_kl_nats"] or 0) > 0]
    learners = dict.fromkeys(row["learner"] for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for learner, colour in zip(learners, ("#888", CTRL, "#2a8c5a", "#c2661c"), strict=False):
            names, group = ("true_kl_nats", "gap_nats", "gap_stderr"), [r for r in rows if r["learner"] == learner]
            kl, gap, stderr = ([row[name] for row in group] for name in names)
            style = {"linestyle": "", "marker": "o", "markersize": 3, "color": colour, "linewidth": 0.8}
            axes.errorbar(kl, gap, yerr=stderr, label=learner, **style)
        low = max(1e-4, min(row["true_kl_nats"] for row in rows) / 2)
        high = 2 * max(row["gap_nats"] for row in rows)
        axes.plot([low, high], [low, high], color=QUIET, linewidth=1, zorder=0)
        axes.annotate("gap = true KL", (high / 4, high / 4), xytext=(4, -10), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="true KL of the samples (nats)", ylabel="certified gap (nats)")
        plain_ticks(axes.xaxis, axes.yaxis)
        axes.legend(frameon=False, fontsize=8)
        headline(axes, "Certified gap against true KL")
    return figure


def growth_figure(rows: Rows) -> Figure:
    """Plot the gap and the training time of one task against dimensions, a line for each number of steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        least = min(row["seconds"] for row in rows)
        for steps, marker in zip(sorted({row["steps"] for row in rows}), "o^sD", strict=False):
            line = [row for row in rows if row["steps"] == steps and row["gap_nats"] is not None]
            line.sort(key=lambda row: row["dim"])
            x, gap, stderr = ([row[name] for row in line] for name in ("dim", "gap_nats", "gap_stderr"))
            style = {"color": CTRL, "marker": marker, "markersize": 4, "linewidth": 1.2, "label": f"{steps} steps"}
            left.errorbar(x, gap, yerr=stderr, **style)
            right.plot(x, [row["seconds"] / least for row in line], **style)
        for axes, title in ((left, "Gap (nats)"), (right, "Training time, the quickest = 1")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(dim) for dim in x])
            axes.set(xlabel="dimensions", ylim=(0, None))
            axes.legend(frameon=False, fontsize=8)
            headline(axes, title)
    return figure


def write_exact_report(folder: Path, rows: Rows, pictures: Sequence[Picture], command: str, version: str) -> None:
    """Write density.png, gap.png, growth.png (where D grows) and a report.html from exact.json's rows and pictures."""
    shown = [p for p in pictures if p.task.gamma == 1.0 and p.learner == "adjoint"]
    figures = {"density": density_figure(shown), "gap": gap_figure(rows)}
    task = {"learner": "adjoint"} | {name: getattr(GROWING, name) for name in ("schedule", "likelihood", "gamma")}
    growing = [row for row in rows if task.items() <= row.items()]
    if any(row["dim"] > 2 for row in growing):
        figures["growth"] = growth_figure(growing)
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in figures.items()}
    render(folder / "report.html", "exact.html", images=images, rows=rows, command=command, version=version)


# the methods of bias.json by the cause of their bias, with the colour of a group
CAUSES = {
    "the steps are finite": ("#333", (FLOOR, PLUG_IN)),
    "p(y | x_t) is approximated": ("#c2661c", ("DPS", "MPGD")),
    "labels and training": ("#2a8c5a", ("classifier guidance", "classifier-free guidance")),
    "the learner is stopped": (CTRL, (LEARNER,)),
    "the particles are few": ("#7a5ba6", ("TDS", "Feynman–Kac", "importance")),
    "none: exact, paid in tries": ("#2f8f9d", ("rejection",)),
    "it is no tilt": ("#888", ("best of K",)),
}
SMALLEST_SHOWN = 1e-4  # nats


class BiasLine(NamedTuple):
    """Hold a line of the picture of biases."""

    cause: str
    label: str
    rows: Rows


def bias_lines(rows: Rows) -> list[BiasLine]:
    """Group the rows of one schedule into the lines of the picture, top to bottom."""
    lines = []
    for cause, (_, methods) in CAUSES.items():
        for method in methods:
            groups: dict[tuple, list[dict[str, Any]]] = {}
            for row in rows:
                if row["method"] == method:
                    groups.setdefault((row["labels"], row["particles"]), []).append(row)
            for (labels, particles), group in groups.items():
                more = f", {labels:,} labels" if labels else f", K = {particles}" if particles else ""
                lines.append(BiasLine(cause, (method + more).replace("of K, K =", "of"), group))
    return lines


def bias_figure(rows: Rows) -> Figure:
    """Plot the KL of every method's samples from the target, grouped by cause: a panel for each likelihood.

    Of the first schedule. A KL that the samples cannot tell from 0 is a bar that ends two standard errors up.
    """
    rows = [row for row in rows if row["schedule"] == rows[0]["schedule"]]
    likelihoods, steps = list(dict.fromkeys(row["likelihood"] for row in rows)), sorted({row["steps"] for row in rows})
    lines = bias_lines(rows)
    causes = [line.cause for line in lines]
    groups = [sum(a != b for a, b in zip(causes[:i], causes[1 : i + 1], strict=True)) for i in range(len(lines))]
    heights = [i + 1.5 * group for i, group in enumerate(groups)]  # room above each group for its name
    most = 2 * max(row["true_kl_nats"] for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.6 * len(likelihoods), 1.3 + 0.19 * heights[-1]), layout="constrained")
        panels = np.ravel(figure.subplots(1, len(likelihoods), sharey=True, squeeze=False))
        for axes, likelihood in zip(panels, likelihoods, strict=True):
            for line, height in zip(lines, heights, strict=True):
                by_steps = {row["steps"]: row for row in line.rows if row["likelihood"] == likelihood}
                show_bias(axes, height, by_steps, steps, CAUSES[line.cause][0])
                if line.label == FLOOR:
                    floor = by_steps[steps[-1]]["true_kl_nats"]
                    axes.axvline(floor, color="#333", linewidth=0.8, linestyle=":", zorder=0)
            axes.set(xscale="log", xlim=(SMALLEST_SHOWN, most), xlabel="KL from the target (nats)")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(axis="x", color="#eee", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
            headline(axes, f"y: {likelihood}")
        panels[0].set_yticks(heights, [line.label for line in lines])
        panels[0].set_ylim(heights[-1] + 0.8, -2)
        for cause in dict.fromkeys(causes):
            panels[0].annotate(
                cause, (0, heights[causes.index(cause)] - 1.1), xycoords=("axes fraction", "data"), xytext=(-4, 0),
                textcoords="offset points", ha="right", va="center", color=CAUSES[cause][0], fontweight="bold",
                annotation_clip=False,
            )  # fmt: skip
        marks = [
            Line2D([], [], color="#555", linestyle="", marker="o", markerfacecolor=fill, label=f"{n} steps")
            for n, fill in zip(steps, ("white", "#555"), strict=False)
        ]
        marks.append(Line2D([], [], color="#333", linewidth=0.8, linestyle=":", label=f"{FLOOR}, {steps[-1]} of them"))
        marks.append(Line2D([], [], color="#555", linewidth=3, alpha=0.35, label="cannot be told from 0"))
        figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def show_bias(axes: Axes, height: float, rows: dict[int, dict[str, Any]], steps: Sequence[int], colour: str) -> None:
    """Plot one method's KL on a line, its rows by number of steps: few steps hollow and many full."""
    kls = {n: rows[n]["true_kl_nats"] for n in steps if n in rows}
    shown = {n: max(kl, SMALLEST_SHOWN) for n, kl in kls.items()}
    axes.plot(list(shown.values()), [height] * len(shown), color=colour, linewidth=1, zorder=1)
    for n, x in shown.items():
        error = 2 * rows[n]["true_kl_stderr"]
        if error and kls[n] < error:
            axes.plot([SMALLEST_SHOWN, max(kls[n], 0) + error], [height] * 2, color=colour, linewidth=3, alpha=0.35)
            continue
        axes.errorbar(
            x, height, xerr=[[min(error, x - SMALLEST_SHOWN)], [error]] if error else None, color=colour, marker="o",
            markersize=4.5, markerfacecolor=colour if n == steps[-1] else "white", linewidth=1, zorder=2,
        )  # fmt: skip


def write_bias_report(folder: Path, rows: Rows, command: str, version: str) -> None:
    """Write bias.png and a report.html about the causes of each method's bias, from the rows of bias.json."""
    images = {"bias": embedded(folder / "bias.png", bias_figure(rows))}
    render(folder / "report.html", "bias.html", images=images, rows=rows, command=command, version=version)
