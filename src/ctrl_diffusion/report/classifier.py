"""Report a classifier: reliability, confusion, intervals."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from torch import Tensor

from ..data.labelled import LabelledImages
from ..reward.panel import Panel
from .style import CTRL, QUIET, STYLE, embedded, headline, render, shortened


def reliability_figure(p: Tensor, y: Tensor, bins: int = 10) -> Figure:
    """How often y (n,) came true where p (n, K) was said of it: all classes' probabilities in ten bins."""
    hit = torch.nn.functional.one_hot(y, p.shape[1]).to(p)
    cell = (p.flatten() * bins).long().clamp(max=bins - 1)
    count = cell.bincount(minlength=bins)
    said = torch.zeros(bins).index_add_(0, cell, p.flatten()) / count
    came = torch.zeros(bins).index_add_(0, cell, hit.flatten()) / count
    some = count > 0
    said, came, count = (a[some].numpy() for a in (said, came, count))
    error = (came * (1 - came) / count) ** 0.5
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1)
        axes.errorbar(said, came, yerr=error, color=CTRL, marker="o", markersize=3.5, linewidth=1.2, capsize=2)
        for at, y, n in zip(said, came, count, strict=True):
            axes.annotate(int(n), (at, y), xytext=(4, -9), textcoords="offset points", fontsize=7, color="#777")
        axes.set(xlabel="probability said", ylabel="share that came true", xlim=(0, 1), ylim=(0, 1.02))
        headline(axes, "Reliability on held-out data")
    return figure


def intervals_figure(said: Tensor, came: Tensor) -> Figure:
    """How often central intervals of p̂ on a scale hold y, against what they say (9,)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1)
        axes.plot(said.numpy(), came.numpy(), color=CTRL, marker="o", markersize=3.5, linewidth=1.2)
        axes.set(xlabel="interval said", ylabel="share of y within", xlim=(0, 1), ylim=(0, 1.02))
        headline(axes, "Intervals on held-out data")
    return figure


def confusion_figure(confusion: Tensor, values: Sequence[str], asked: str, came: str, title: str) -> Figure:
    """Shares (K, K): row y says what came of the samples of y."""
    size = 1.6 + 0.42 * len(values)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size + 0.4, size), layout="constrained")
        axes = figure.subplots()
        axes.imshow(confusion.numpy(), cmap="Blues", vmin=0, vmax=1)
        places, names = range(len(values)), [shortened(value) for value in values]
        axes.set_xticks(places, names, rotation=0 if max(map(len, names)) < 5 else 40, ha="center")
        axes.set_yticks(places, names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel=came, ylabel=asked)
        if len(values) <= 12:
            for i in places:
                for j in places:
                    share = float(confusion[i, j])
                    axes.text(
                        j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                        color="white" if share > 0.5 else "#333",
                    )  # fmt: skip
        headline(axes, title)
    return figure


def write_classifier_report(folder: Path, panel: Panel, held_out: LabelledImages) -> None:
    """Write reliability.png, confusion.png and a self-contained report.html about p̂."""
    truth, log_p = held_out.labels[panel.control], panel.log_prob(held_out)
    nearest = held_out.space(panel.control).nearest(truth)
    confusion = confusion_matrix(nearest, log_p.argmax(1), labels=range(len(panel.values)), normalize="true")
    figures = {
        "reliability": intervals_figure(*panel.intervals(held_out))
        if held_out.space(panel.control).scale
        else reliability_figure(log_p.exp(), truth),
        "confusion": confusion_figure(
            torch.from_numpy(confusion), panel.values, f"true {panel.control}", "classifier says", "Held-out data, %"
        ),
    }
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in figures.items()}
    render(folder / "report.html", "classifier.html", images=images, panel=panel, held_out=len(held_out))
