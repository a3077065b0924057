"""Pictures and the HTML report of a run."""

import base64
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .classifier import Classifier
from .config import Config
from .data import LabelledImages, to_pixels
from .evaluate import Evaluation
from .files import write_text, writing

CTRL, QUIET = "#0b62a4", "#c9ced6"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666",
    "figure.dpi": 160,
    "svg.hashsalt": "ctrl",
}


def save_figure(path: Path, figure: Figure) -> None:
    """Write a PNG whole, without the program's name and the time, so that equal pictures are equal bytes."""
    with writing(path) as temporary:
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
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")


def grid_figure(pictures: dict[str, Tensor], rows: list[str], columns: list[str], label: str) -> Figure:
    """One grid per title, side by side; columns are the prior's classes, rows the control's."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(pictures), 0.52 * len(rows) + 0.6), layout="constrained")
        for axes, (title, x) in zip(np.ravel(figure.subplots(1, len(pictures))), pictures.items(), strict=True):
            show_grid(axes, x, len(rows), rows, columns, title)
            axes.set_ylabel(label)
    return figure


def curves_figure(records: list[dict[str, Any]], log_z: float) -> Figure:
    """J climbing to log Z, KL and reward at the probes of a run."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        position, ends = 0, []
        probes: list[tuple[int, dict]] = []
        for stage in dict.fromkeys(record["stage"] for record in records):
            mine = [record for record in records if record["stage"] == stage]
            probes += [(position + record["update"], record) for record in mine if "J" in record]
            position += max(record["update"] for record in mine)
            ends.append((position, stage))
        x = [at for at, _ in probes]
        for axes, key, title in (
            (left, "J", "J"),
            (middle, "probe_kl", "KL from the prior"),
            (right, "probe_reward", "reward"),
        ):
            axes.plot(x, [record[key] for _, record in probes], color=CTRL, marker="o", markersize=2.5, linewidth=1.2)
            axes.set_title(f"{title} (nats)", loc="left", fontsize=10, fontweight="bold")
            axes.set_xlabel("updates")
            for end, stage in ends:
                axes.axvline(end, color=QUIET, linewidth=0.8)
                axes.text(
                    end, 0.02, f"{stage} ", transform=axes.get_xaxis_transform(), ha="right", color="#777", fontsize=8
                )
        left.axhline(log_z, color="#333", linewidth=1, linestyle="--")
        left.annotate(
            f"log Z = {log_z:.2f}", (0.98, log_z), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", color="#333", fontsize=8,
        )  # fmt: skip
        left.margins(y=0.12)
    return figure


@torch.no_grad()
def reliability_figure(classifier: Classifier, held_out: LabelledImages, control: str, bins: int = 10) -> Figure:
    """How often the classifier is right when it says p, on held-out data: all classes' probabilities in ten bins."""
    p = classifier.log_prob(held_out.x).exp()
    hit = torch.nn.functional.one_hot(held_out.labels[control], p.shape[1]).to(p)
    cell = (p.flatten() * bins).long().clamp(max=bins - 1)
    count = cell.bincount(minlength=bins)
    said = torch.zeros(bins).index_add_(0, cell, p.flatten()) / count
    came = torch.zeros(bins).index_add_(0, cell, hit.flatten()) / count
    error = (came * (1 - came) / count).sqrt()
    some = count > 0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1)
        axes.errorbar(
            said[some], came[some], yerr=error[some], color=CTRL, marker="o", markersize=3.5, linewidth=1.2, capsize=2
        )
        for at, y, n in zip(said[some], came[some], count[some], strict=True):
            axes.annotate(int(n), (at, y), xytext=(4, -9), textcoords="offset points", fontsize=7, color="#777")
        axes.set(xlabel="probability said", ylabel="share that came true", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title("Reliability on held-out data", loc="left", fontsize=10, fontweight="bold")
    return figure


def sheet_figure(x: Tensor, columns: int = 8) -> Figure:
    """One picture of all samples x (n, C, H, W), row by row."""
    rows = -(-len(x) // columns)
    blank = torch.ones(rows * columns - len(x), *x.shape[1:])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 * columns, 0.6 * rows), layout="constrained")
        show_grid(figure.subplots(), torch.cat([x, blank]), rows, [""] * rows, [""] * columns, "")
    return figure


def write_report(
    folder: Path,
    config: Config,
    metrics: dict,
    evaluation: Evaluation,
    records: list[dict],
    classifier: Classifier,
    held_out: LabelledImages,
    pictures: dict[str, Tensor],
) -> None:
    """Write grid.png, curves.png, reliability.png and a self-contained report.html.

    Args:
        folder: the run's.
        config, metrics, evaluation: what was run and found.
        records: the training log.
        classifier, held_out: the reward's classifier and the data it has not seen.
        pictures: title → samples on the same noise, one for every (y, c), c running fastest.
    """
    control = config.control
    rows = held_out.values[control]
    columns = [str(c) for c in range(len(next(iter(pictures.values()))) // len(rows))]
    figures = {
        "grid": grid_figure(pictures, list(rows), columns, control),
        "curves": curves_figure(records, evaluation.certificate.log_z),
        "reliability": reliability_figure(classifier, held_out, control),
    }
    images = {}
    for name, figure in figures.items():
        save_figure(folder / f"{name}.png", figure)
        images[name] = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    certificate = evaluation.certificate
    certified = (certificate.objective_pairs, certificate.log_z_pairs, certificate.stderr_pairs.square())
    objective, log_z, variance = (table.view(-1, len(rows)).mean(0) for table in certified)
    stderr = (variance / len(columns)).sqrt()
    per_class = zip(rows, *(a.tolist() for a in (objective, log_z, log_z - objective, stderr)), strict=True)
    environment = Environment(
        loader=PackageLoader("ctrl_diffusion"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(
        metrics=metrics,
        images=images,
        config=config,
        control=control,
        per_class=list(per_class),
    )
    write_text(folder / "report.html", page)
