"""Report the testbed: densities, gaps, biases."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def density_figure(pictures: Sequence[Picture]) -> Figure:
    """Samples of a trained policy over the density of the chain's target, one panel for each task."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * columns, 2.8 * rows), layout="constrained")
        panels = np.ravel(figure.subplots(rows, columns, squeeze=False))
        for axes, picture in zip(panels, pictures, strict=False):
            reach = picture.axis.abs() <= 3
            axis, density = picture.axis[reach].numpy(), picture.density[reach][:, reach].numpy()
            axes.contourf(axis, axis, density.T, levels=np.linspace(0.03, 1, 9) * density.max(), cmap="Blues")
            axes.scatter(*picture.ends.T.numpy(), s=1.5, color="#c2661c", alpha=0.5, linewidths=0)
            axes.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3), xticks=[-2, 0, 2], yticks=[-2, 0, 2])
            headline(axes, picture.task.title)
        for axes in panels[len(pictures) :]:
            axes.remove()
    return figure


def gap_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """The certificate's gap against the true KL where that is known: no point may lie right of the line."""
    known = [row for row in rows if row["true_kl_nats"] is not None and row["true_kl_nats"] > 0]
    colours = dict(
        zip(dict.fromkeys(row["learner"] for row in known), ("#888", CTRL, "#2a8c5a", "#c2661c"), strict=False)
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for learner, colour in colours.items():
            mine = [row for row in known if row["learner"] == learner]
            axes.errorbar(
                [row["true_kl_nats"] for row in mine], [row["gap_nats"] for row in mine],
                yerr=[row["gap_stderr"] for row in mine], linestyle="", marker="o", markersize=3, color=colour,
                linewidth=0.8, label=learner,
            )  # fmt: skip
        low = max(1e-4, min(row["true_kl_nats"] for row in known) / 2)
        high = 2 * max(row["gap_nats"] for row in known)
        axes.plot([low, high], [low, high], color=QUIET, linewidth=1, zorder=0)
        axes.annotate("gap = true KL", (high / 4, high / 4), xytext=(4, -10), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel="true KL of the samples (nats)", ylabel="certified gap (nats)")
        plain_ticks(axes.xaxis, axes.yaxis)
        axes.legend(frameon=False, fontsize=8)
        headline(axes, "Certified gap against true KL")
    return figure


def growth_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Gap and training time of one task against dimensions, one line for each number of steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        least = min(row["seconds"] for row in rows)
        for steps, marker in zip(sorted({row["steps"] for row in rows}), "o^sD", strict=False):
            mine = sorted((row for row in rows if row["steps"] == steps), key=lambda row: row["dim"])
            x, look = [row["dim"] for row in mine], {"color": CTRL, "marker": marker, "markersize": 4, "linewidth": 1.2}
            error = [row["gap_stderr"] for row in mine]
            left.errorbar(x, [row["gap_nats"] for row in mine], yerr=error, label=f"{steps} steps", **look)
            right.plot(x, [row["seconds"] / least for row in mine], label=f"{steps} steps", **look)
        for axes, title in ((left, "Gap (nats)"), (right, "Training time, the quickest = 1")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [str(dim) for dim in x])
            axes.set(xlabel="dimensions", ylim=(0, None))
            axes.legend(frameon=False, fontsize=8)
            headline(axes, title)
    return figure


def of_growing(row: dict[str, Any]) -> bool:
    """Whether a row of exact.json is of the task that grows in dimensions."""
    return (row["schedule"], row["likelihood"], row["gamma"]) == (GROWING.schedule, GROWING.likelihood, GROWING.gamma)


def write_exact_report(
    folder: Path, rows: Sequence[dict[str, Any]], pictures: Sequence[Picture], command: str, version: str
) -> None:
    """Write density.png, gap.png, growth.png (where D grows) and a report.html about the races on the testbed.

    Args:
        folder: to write into.
        rows: of exact.json.
        pictures: of the races; those of `adjoint` at γ = 1 are shown.
        command: what was typed.
        version: of this package.
    """
    shown = [p for p in pictures if p.task.gamma == 1.0 and p.learner == "adjoint"]
    figures = {"density": density_figure(shown), "gap": gap_figure(rows)}
    growing = [r for r in rows if r["learner"] == "adjoint" and of_growing(r)]
    if any(row["dim"] > 2 for row in growing):
        figures["growth"] = growth_figure(growing)
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in figures.items()}
    render(folder / "report.html", "exact.html", images=images, rows=rows, command=command, version=version)


# the methods of bias.json by what their bias comes from, with the colour of a group
ORIGINS = {
    "the steps are finite": ("#333", (FLOOR, PLUG_IN)),
    "p(y | x_t) is approximated": ("#c2661c", ("DPS", "MPGD")),
    "labels and training": ("#2a8c5a", ("classifier guidance", "classifier-free guidance")),
    "the learner is stopped": (CTRL, (LEARNER,)),
    "the particles are few": ("#7a5ba6", ("TDS", "Feynman–Kac", "importance")),
    "none: exact, paid in tries": ("#2f8f9d", ("rejection",)),
    "it is no tilt": ("#888", ("best of K",)),
}
SMALLEST_SHOWN = 1e-4  # nats


def bias_lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """The lines of the picture, top to bottom: origin, what is written, and its rows, those of one schedule."""
    found = []
    for origin, (_, methods) in ORIGINS.items():
        for method in methods:
            mine = [row for row in rows if row["method"] == method]
            for kind in dict.fromkeys((row["labels"], row["particles"]) for row in mine):
                of_kind = [row for row in mine if (row["labels"], row["particles"]) == kind]
                labels, particles = kind
                more = f", {labels:,} labels" if labels else f", K = {particles}" if particles else ""
                found.append((origin, (method + more).replace("of K, K =", "of"), of_kind))
    return found


def bias_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """KL of every method's samples from the target, grouped by where it comes from: a panel for each likelihood.

    Of the first schedule. What cannot be told from 0 in the samples that were counted is a bar that ends two standard
    errors up.
    """
    rows = [row for row in rows if row["schedule"] == rows[0]["schedule"]]
    likelihoods, steps = list(dict.fromkeys(row["likelihood"] for row in rows)), sorted({row["steps"] for row in rows})
    lines = bias_lines(rows)
    origins = [origin for origin, _, _ in lines]
    gaps = [sum(a != b for a, b in zip(origins[:i], origins[1 : i + 1], strict=True)) for i in range(len(lines))]
    heights = [i + 1.5 * gap for i, gap in enumerate(gaps)]  # a line of its own for the name of a group
    most = 2 * max(row["true_kl_nats"] for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.6 * len(likelihoods), 1.3 + 0.19 * heights[-1]), layout="constrained")
        panels = np.ravel(figure.subplots(1, len(likelihoods), sharey=True, squeeze=False))
        for axes, likelihood in zip(panels, likelihoods, strict=True):
            for (origin, name, mine), height in zip(lines, heights, strict=True):
                here = {row["steps"]: row for row in mine if row["likelihood"] == likelihood}
                show_bias(axes, height, here, steps, ORIGINS[origin][0])
                if name == FLOOR:
                    axes.axvline(here[steps[-1]]["true_kl_nats"], color="#333", linewidth=0.8, linestyle=":", zorder=0)
            axes.set(xscale="log", xlim=(SMALLEST_SHOWN, most), xlabel="KL from the target (nats)")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(axis="x", color="#eee", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
            headline(axes, f"y: {likelihood}")
        panels[0].set_yticks(heights, [name for _, name, _ in lines])
        panels[0].set_ylim(heights[-1] + 0.8, -2)
        for origin, (colour, _) in ORIGINS.items():
            if origin in origins:
                top = heights[origins.index(origin)] - 1.1
                panels[0].annotate(
                    origin, (0, top), xycoords=("axes fraction", "data"), xytext=(-4, 0), textcoords="offset points",
                    ha="right", va="center", color=colour, fontweight="bold", annotation_clip=False,
                )  # fmt: skip
        marks = [
            Line2D([], [], color="#555", linestyle="", marker="o", markerfacecolor=fill, label=f"{n} steps")
            for n, fill in zip(steps, ("white", "#555"), strict=False)
        ]
        marks.append(Line2D([], [], color="#333", linewidth=0.8, linestyle=":", label=f"{FLOOR}, {steps[-1]} of them"))
        marks.append(Line2D([], [], color="#555", linewidth=3, alpha=0.35, label="cannot be told from 0"))
        figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def show_bias(axes: Axes, height: float, here: dict[int, dict[str, Any]], steps: Sequence[int], colour: str) -> None:
    """One method's KL on a line of the picture, few steps hollow and many full."""
    known = [n for n in steps if n in here]
    places = [max(here[n]["true_kl_nats"], SMALLEST_SHOWN) for n in known]
    axes.plot(places, [height] * len(places), color=colour, linewidth=1, zorder=1)
    for n, place in zip(known, places, strict=True):
        kl, error = here[n]["true_kl_nats"], 2 * here[n]["true_kl_stderr"]
        fill = colour if n == steps[-1] else "white"
        if error and kl < error:
            axes.plot([SMALLEST_SHOWN, max(kl, 0) + error], [height] * 2, color=colour, linewidth=3, alpha=0.35)
            continue
        axes.errorbar(
            place, height, xerr=[[min(error, place - SMALLEST_SHOWN)], [error]] if error else None, color=colour,
            marker="o", markersize=4.5, markerfacecolor=fill, linewidth=1, zorder=2,
        )  # fmt: skip


def write_bias_report(folder: Path, rows: Sequence[dict[str, Any]], command: str, version: str) -> None:
    """Write bias.png and a report.html about where each method's bias comes from.

    Args:
        folder: to write into.
        rows: of bias.json.
        command: what was typed.
        version: of this package.
    """
    images = {"bias": embedded(folder / "bias.png", bias_figure(rows))}
    render(folder / "report.html", "bias.html", images=images, rows=rows, command=command, version=version)
