"""Pictures and HTML pages of a run and of a classifier."""

import base64
import shutil
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
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from sklearn.metrics import confusion_matrix
from torch import Tensor

from .data.labelled import LabelledImages, to_pixels
from .evaluate.evaluation import Evaluation
from .evaluate.scores import Score
from .exact.bias import FLOOR, LEARNER, PLUG_IN
from .exact.races import Picture
from .exact.task import GROWING
from .learn.weighted import RENOISING
from .reward.classifiers import Judges
from .run.measure import Shown, columns_of
from .run.run import Run
from .system.files import write_text, writing

CTRL, QUIET = "#0b62a4", "#c9ced6"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666",
    "figure.dpi": 160,
    "text.parse_math": False,
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
    headline(axes, title)


def grid_figure(pictures: dict[str, Tensor], rows: list[str], columns: list[str], label: str) -> Figure:
    """One grid per title, side by side; columns are the prior's classes, rows the control's."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(pictures), 0.52 * len(rows) + 0.6), layout="constrained")
        for axes, (title, x) in zip(np.ravel(figure.subplots(1, len(pictures))), pictures.items(), strict=True):
            show_grid(axes, x, len(rows), rows, columns, title)
            axes.set_ylabel(label)
    return figure


def curves_figure(records: list[dict[str, Any]], log_z: float) -> Figure:
    """J climbing to log Z, KL and reward at the probes of a run; the last record says which control was kept.

    The stage that learns what `weighted` takes off is no control yet and left out.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        position, ends = 0, []
        probes: list[tuple[int, dict]] = []
        *records, kept = [record for record in records if record["stage"] != RENOISING]
        for stage in dict.fromkeys(record["stage"] for record in records):
            mine = [record for record in records if record["stage"] == stage]
            if kept["stage"] == stage:
                kept_at = position + kept["update"]
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
            axes.plot(kept_at, kept[key], color="#333", marker="o", markersize=7, markerfacecolor="none")
            headline(axes, f"{title} (nats)")
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


def accuracy_figure(evaluation: Evaluation, values: Sequence[str], control: str) -> Figure:
    """Accuracy of prior, policy and target for each class asked for."""
    bars = {
        "prior": (evaluation.prior, QUIET),
        "CTRL": (evaluation.ctrl, CTRL),
        "target: a perfect learner": (evaluation.target, "#8fb8d8"),
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(min(9, max(3.6, 1.2 + 0.75 * len(values))), 3.3), layout="constrained")
        axes = figure.subplots()
        for i, (name, (score, colour)) in enumerate(bars.items()):
            at = [k + (i - 1) * 0.27 for k in range(len(values))]
            axes.bar(at, score.confusion.diagonal().numpy(), width=0.25, color=colour, label=name)
        names = [shortened(value) for value in values]
        axes.set_xticks(range(len(values)), names, rotation=40 if sum(map(len, names)) > 40 else 0)
        axes.tick_params(axis="x", length=0)
        axes.set(xlabel=f"{control} asked for", ylabel="share that has it", ylim=(0, 1.02))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        headline(axes, "Accuracy against target")
    return figure


def scale_figure(asked: Tensor, came: Tensor, levels: Sequence[str], control: str) -> Figure:
    """Values asked for against those that came (n,), places on a scale."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.8, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.scatter(asked.numpy(), came.numpy(), s=3, alpha=0.4, color=CTRL, linewidths=0)
        axes.plot([0, len(levels) - 1], [0, len(levels) - 1], color="#333", linewidth=1)
        ticks = range(0, len(levels), 2)
        axes.set_xticks(ticks, [levels[i] for i in ticks])
        axes.set_yticks(ticks, [levels[i] for i in ticks])
        axes.set(xlabel=f"{control} asked for", ylabel=f"{control} that came")
        headline(axes, "Asked for and measured")
    return figure


def sweep_figure(sweep: dict[str, dict[float, Score]], evaluation: Evaluation, trained_steps: int) -> Figure:
    """Accuracy, adherence and diversity as the strength, and as the number of steps, are turned."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (kind, trained) in zip(panels, (("strength", 1.0), ("steps", trained_steps)), strict=True):
            x, scores = list(sweep[kind]), list(sweep[kind].values())
            lines = {
                "accuracy": ([s.accuracy for s in scores], CTRL, "o"),
                "still the class asked for": ([s.class_accuracy for s in scores], "#444", "s"),
                "diversity / target’s": (
                    [evaluation.diversity_ratio(s) for s in scores],
                    "#c2661c",
                    "^",
                ),
            }
            for name, (y, colour, marker) in lines.items():
                if None not in y:
                    axes.plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=name)
            axes.axvline(trained, color=QUIET, linewidth=1, zorder=0)
            axes.axhline(
                evaluation.target.accuracy,
                color=CTRL,
                linewidth=0.8,
                linestyle="--",
                zorder=0,
                label="target’s accuracy",
            )
            axes.set_xticks(x)
            axes.set(xlabel={"strength": "strength w", "steps": "sampling steps"}[kind])
            headline(axes, {"strength": "Strength", "steps": "Sampling steps"}[kind] + " (grey: as trained)")
        panels[0].set_ylim(bottom=0)  # of both, once both are drawn: set before, it would cut the second off
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def shortened(text: str, most: int = 12) -> str:
    """A label that fits an axis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def told_apart(names: Sequence[str]) -> list[str]:
    """Names without the words they all begin with, which for prompts may be all that an axis has room for."""
    words = [name.split() for name in names]
    shared = next((i for i, ones in enumerate(zip(*words, strict=False)) if len(set(ones)) > 1), 0)
    return [" ".join(ones[shared:]) for ones in words]


def headline(axes: Axes, text: str) -> None:
    """A title in the house's style."""
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")


def sheet_figure(x: Tensor, columns: int = 8) -> Figure:
    """One picture of all samples x (n, C, H, W), row by row."""
    rows = -(-len(x) // columns)
    blank = torch.ones(rows * columns - len(x), *x.shape[1:])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.6 * columns, 0.6 * rows), layout="constrained")
        show_grid(figure.subplots(), torch.cat([x, blank]), rows, [""] * rows, [""] * columns, "")
    return figure


def plane_figure(run: Run, x: Tensor) -> Figure:
    """`plane`."""
    (first, rows), (second, columns) = [(n, run.policy.controls[n].values) for n in run.names[:2]]
    across = x.shape[2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.42 * across * x.shape[1] + 1, 0.46 * len(x) + 0.9), layout="constrained")
        for j, axes in enumerate(figure.subplots(1, x.shape[1])):
            names = [shortened(name, 8) for name in ("–", *rows)] if j == 0 else [""] * len(x)
            title = shortened(("–", *columns)[j])
            show_grid(axes, x[:, j].flatten(0, 1), len(x), names, [""] * across, f"{second}: {title}")
            if j == 0:
                axes.set_ylabel(first)
    return figure


def write_report(
    folder: Path,
    run: Run,
    metrics: dict[str, Any],
    evaluation: Evaluation,
    sweep: dict[str, dict[float, Score]],
    followed: dict[str, tuple[Tensor, Tensor]],
    shown: Shown,
    records: list[dict[str, Any]],
    command: str,
) -> None:
    """Write the pictures of a run and a self-contained report.html.

    Args:
        folder: the run's; its classifier/ has been reported already.
        run: the finished run.
        metrics, evaluation, sweep, followed, shown: what was found.
        records: the training log.
        command: what was typed.
    """
    control, values, classes = run.name, run.values, run.config.classes
    condition = next((one.condition for one in run.config.controls if one.condition), None)
    column_names = [""] * columns_of(run)
    if classes is not None:
        column_names = [shortened(name, 8) for name in told_apart([run.prior.class_names[c] for c in classes[:10]])]
    pictures = {f"Prior, which ignores {control}": shown.prior, "CTRL, same noise": shown.ctrl}
    measured = "measured by the ruler" if run.accuracy_by == "ruler" else "seen by the judge"
    figures = {
        "grid": grid_figure(pictures, [shortened(value) for value in values], column_names, control),
        "curves": curves_figure(records, evaluation.certificate.log_z),
        "accuracy": accuracy_figure(evaluation, values, control),
        "confusion": confusion_figure(
            evaluation.ctrl.confusion, values, f"{control} asked for", measured, "Confusion of CTRL, %"
        ),
        "sweep": sweep_figure(sweep, evaluation, run.config.steps),
    }
    for name, (asked, came) in followed.items():
        figures[f"scale-{name}"] = scale_figure(asked, came, run.policy.controls[name].values, name)
    if shown.plane is not None:
        figures["plane"] = plane_figure(run, shown.plane)
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in figures.items()}
    for i, name in enumerate(run.names):
        picture = "reliability" if i == 0 else f"reliability-{name}"
        shutil.copyfile(run.room(folder, "classifier", name) / "reliability.png", folder / f"{picture}.png")
        images[picture] = base64.b64encode((folder / f"{picture}.png").read_bytes()).decode()
    render(
        folder / "report.html",
        "report.html",
        images=images,
        metrics=metrics,
        config=run.config,
        conditional=any(judges.classifier.conditional for judges in run.judges.values()),
        settings=flattened(run.config.model_dump()),
        control=control,
        names=run.names,
        condition=condition,
        values=values,
        rows=by_class(evaluation, len(values)),
        command=command,
    )


def by_class(evaluation: Evaluation, classes: int) -> list[tuple[float, ...]]:
    """J, log Z, gap and its standard error for each class, averaged over the prior's conditions."""
    certificate = evaluation.certificate
    tables = (certificate.objective_pairs, certificate.log_z_pairs, certificate.stderr_pairs.square())
    objective, log_z, variance = (table.view(-1, classes) for table in tables)
    stderr = (variance.mean(0) / len(variance)).sqrt()
    objective, log_z = objective.mean(0), log_z.mean(0)
    return list(zip(*(column.tolist() for column in (objective, log_z, log_z - objective, stderr)), strict=True))


def flattened(settings: dict[str, Any], under: str = "") -> dict[str, Any]:
    """Nested settings as GROUP.KEY: VALUE."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        out |= flattened(value, f"{under}{key}.") if isinstance(value, dict) else {f"{under}{key}": value}
    return out


def write_classifier_report(folder: Path, judges: Judges, held_out: LabelledImages) -> None:
    """Write reliability.png, confusion.png and a self-contained report.html about p̂."""
    truth, log_p = held_out.labels[judges.control], judges.log_prob(held_out)
    nearest = truth.round().clamp(0, len(judges.values) - 1) if held_out.on_scale(judges.control) else truth
    confusion = confusion_matrix(nearest, log_p.argmax(1), labels=range(len(judges.values)), normalize="true")
    figures = {
        "reliability": intervals_figure(*judges.intervals(held_out))
        if held_out.on_scale(judges.control)
        else reliability_figure(log_p.exp(), truth),
        "confusion": confusion_figure(
            torch.from_numpy(confusion), judges.values, f"true {judges.control}", "classifier says", "Held-out data, %"
        ),
    }
    images = {name: embedded(folder / f"{name}.png", figure) for name, figure in figures.items()}
    render(folder / "report.html", "classifier.html", images=images, judges=judges, held_out=len(held_out))


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


def plain_ticks(*axes: Axis) -> None:
    """Numbers as they are on logarithmic axes, a few to each power of ten."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


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


def embedded(path: Path, figure: Figure) -> str:
    """Write the figure as a PNG, and return it as text for a page."""
    save_figure(path, figure)
    return base64.b64encode(path.read_bytes()).decode()


def render(path: Path, template: str, **content: Any) -> None:
    """Write a page from a template."""
    environment = Environment(
        loader=PackageLoader("ctrl_diffusion"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    write_text(path, environment.get_template(template).render(**content))
