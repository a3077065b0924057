"""Report a classifier: draw its reliability or intervals and its confusion, write its page."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from torch import Tensor

from ..data.labelled import LabelledImages
from ..evaluate.learning_curve import LOSSES, LearningCurve
from ..reward.panel import Panel
from .style import CTRL, QUIET, STYLE, embedded, headline, plain_ticks, render, shortened


def diagonal_figure(
    x: np.ndarray, y: np.ndarray, labels: tuple[str, str], title: str, counts: np.ndarray | None = None
) -> Figure:
    """Plot shares y, each of so many counts, against probabilities x; a calibrated p̂ lies on the diagonal."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 3.3), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1)
        style = {"color": CTRL, "marker": "o", "markersize": 3.5, "linewidth": 1.2}
        if counts is None:
            axes.plot(x, y, **style)
        else:
            axes.errorbar(x, y, yerr=(y * (1 - y) / counts) ** 0.5, capsize=2, **style)
            for n, *point in zip(counts, x, y, strict=True):
                axes.annotate(int(n), point, xytext=(4, -9), textcoords="offset points", fontsize=7, color="#777")
        axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(0, 1), ylim=(0, 1.02))
        headline(axes, title)
    return figure


def reliability_figure(p: Tensor, y: Tensor, bins: int = 10) -> Figure:
    """Plot how often y (n,) is the class, against its probability p (n, K), over all classes in bins."""
    hits = torch.nn.functional.one_hot(y, p.shape[1]).to(p)
    cell = (p.flatten() * bins).long().clamp(max=bins - 1)
    count = cell.bincount(minlength=bins)
    means = [torch.zeros(bins).index_add_(0, cell, a.flatten()) / count for a in (p, hits)]
    probability, share, count = (a[count > 0].numpy() for a in (*means, count))
    labels = ("probability said", "share that came true")
    return diagonal_figure(probability, share, labels, "Reliability on held-out data", count)


def intervals_figure(nominal: Tensor, empirical: Tensor) -> Figure:
    """Plot how often central intervals of p̂ on a scale hold y, against their probability: two (9,)."""
    labels = ("interval said", "share of y within")
    return diagonal_figure(nominal.numpy(), empirical.numpy(), labels, "Intervals on held-out data")


def confusion_figure(confusion: Tensor, values: Sequence[str], rows: str, columns: str, title: str) -> Figure:
    """Draw shares (K, K), of which each row sums to 1; `rows` and `columns` name the axes."""
    size = 1.6 + 0.42 * len(values)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size + 0.4, size), layout="constrained")
        axes = figure.subplots()
        axes.imshow(confusion.numpy(), cmap="Blues", vmin=0, vmax=1)
        ticks, names = range(len(values)), [shortened(value) for value in values]
        axes.set_xticks(ticks, names, rotation=0 if max(map(len, names)) < 5 else 40, ha="center")
        axes.set_yticks(ticks, names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel=columns, ylabel=rows)
        style = {"ha": "center", "va": "center", "fontsize": 8}
        for i, j in product(ticks, ticks) if len(values) <= 12 else ():
            share = float(confusion[i, j])
            axes.text(j, i, f"{100 * share:.0f}", color="white" if share > 0.5 else "#333", **style)
        headline(axes, title)
    return figure


def curve_figure(curve: LearningCurve) -> Figure:
    """Plot each figure against the number of labels: measured with its error, its law, and extrapolated."""
    titles = {"nll": "NLL (nats)", "accuracy": "accuracy", "target": "target it would allow"}
    n = np.geomspace(curve.labels[0], curve.beyond[-1], 100)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        for axes, (name, series) in zip(figure.subplots(1, len(titles)), curve.series.items(), strict=True):
            style = {"color": CTRL, "marker": "o", "markersize": 3.5, "linewidth": 0, "elinewidth": 1.2, "capsize": 2}
            axes.errorbar(curve.labels, series.mean, yerr=series.error, label="measured", **style)
            if not series.doubt:
                loss = series.law(n)
                axes.plot(n, loss if LOSSES[name] > 0 else 1 - loss, color=QUIET, linewidth=1.2, zorder=0)
                expected, low, high = np.array(series.beyond).T
                error = [np.maximum(0, expected - low), np.maximum(0, high - expected)]
                axes.errorbar(curve.beyond, expected, yerr=error, **{**style, "color": "#777", "marker": "s"})
            axes.set_xscale("log")
            axes.set(xlabel="labels")
            plain_ticks(axes.xaxis)
            headline(axes, titles[name])
    return figure


def write_classifier_report(
    folder: Path, panel: Panel, held_out: LabelledImages, curve: LearningCurve | None = None
) -> None:
    """Write reliability.png, confusion.png, curve.png if there is a curve, and a self-contained report.html about p̂."""
    y, log_p, space = held_out.labels[panel.control], panel.log_prob(held_out), panel.space
    confusion = confusion_matrix(space.nearest(y), log_p.argmax(1), labels=range(space.size), normalize="true")
    axes = (f"true {panel.control}", "classifier says", "Held-out data, %")
    reliability = intervals_figure(*panel.intervals(held_out)) if space.scale else reliability_figure(log_p.exp(), y)
    confusions = confusion_figure(torch.from_numpy(confusion), space.values, *axes)
    figures = {"reliability": reliability, "confusion": confusions}
    figures |= {"curve": curve_figure(curve)} if curve else {}
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in figures.items()}
    render(folder / "report.html", "classifier.html", images=images, panel=panel, held_out=len(held_out), curve=curve)
