"""Draw the pictures of a run, and write its report.html."""

import base64
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..evaluate.certificate import Certificate, mean_error
from ..evaluate.clusters import cluster_error
from ..evaluate.evaluation import Evaluation
from ..evaluate.verdict import Verdict
from ..learn.weighted import RENOISING
from ..run.folder import RunFolder
from ..run.measure import Measurements, ScaleSamples
from ..run.metrics import RunMetrics, SweepPoint
from ..run.run import Run
from .classifier import confusion_figure
from .held_out import HeldOut, gaps_figure
from .pictures import PictureSamples, columns_of
from .style import CTRL, QUIET, STYLE, distinct_endings, embedded, headline, render, shortened, show_grid, stacked


class ClassRow(NamedTuple):
    """Hold J, log Z and gap of a class, means over its certified pairs, else over those on the policy's paths alone."""

    objective: float
    log_z: float | None
    gap: float | None
    stderr: float | None
    certified: int  # conditions c
    on_paths: int


def grid_figure(pictures: dict[str, Tensor], rows: list[str], columns: list[str], label: str) -> Figure:
    """Draw one grid per title, side by side; columns are the prior's classes, rows the control's."""
    height = 0.6 + 0.15 * max(name.count("\n") for name in columns)  # of title and names
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(pictures), 0.52 * len(rows) + height), layout="constrained")
        for axes, (title, x) in zip(np.ravel(figure.subplots(1, len(pictures))), pictures.items(), strict=True):
            show_grid(axes, x, len(rows), rows, columns, title)
            axes.set_ylabel(label)
    return figure


def curves_figure(records: list[dict[str, Any]], certificate: Certificate) -> Figure:
    """Plot J, which climbs to log Z, KL and reward at the probes of a run; the last record is of the kept control.

    The stage of re-noising is left out: its weights are no control yet. J is a mean over all pairs, and so is the log Z
    drawn; where some are not certified, whose estimates are low, it is marked as that.
    """
    log_z, sign = float(certificate.pairs.log_z.mean()), "≥" if certificate.uncertified else "="
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        panels = figure.subplots(1, 3)
        position, ends, probes = 0, [], []
        *records, kept = [record for record in records if record["stage"] != RENOISING]
        for stage in dict.fromkeys(record["stage"] for record in records):
            stage_records = [record for record in records if record["stage"] == stage]
            if kept["stage"] == stage:
                kept_at = position + kept["update"]
            probes += [(position + record["update"], record) for record in stage_records if "J" in record]
            position += max(record["update"] for record in stage_records)
            ends.append((position, stage))
        x = [number for number, _ in probes]
        keys = {"J": "J", "probe_kl": "KL from the prior", "probe_reward": "reward"}
        for axes, (key, title) in zip(panels, keys.items(), strict=True):
            axes.plot(x, [record[key] for _, record in probes], color=CTRL, marker="o", markersize=2.5, linewidth=1.2)
            axes.plot(kept_at, kept[key], color="#333", marker="o", markersize=7, markerfacecolor="none")
            headline(axes, f"{title} (nats)")
            axes.set_xlabel("updates")
            for end, stage in ends:
                axes.axvline(end, color=QUIET, linewidth=0.8)
                style = {"transform": axes.get_xaxis_transform(), "ha": "right", "color": "#777", "fontsize": 8}
                axes.text(end, 0.02, f"{stage} ", **style)
        panels[0].axhline(log_z, color="#333", linewidth=1, linestyle="--")
        panels[0].annotate(
            f"log Z {sign} {log_z:.2f}", (0.98, log_z), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", color="#333", fontsize=8,
        )  # fmt: skip
        panels[0].margins(y=0.12)
    return figure


def accuracy_figure(evaluation: Evaluation, values: Sequence[str], control: str) -> Figure:
    """Plot the accuracy of prior, policy and target for each class requested."""
    bars = {"prior": (evaluation.prior, QUIET), "CTRL": (evaluation.ctrl, CTRL)}
    bars["target: a perfect learner"] = evaluation.target, "#8fb8d8"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(min(9, max(3.6, 1.2 + 0.75 * len(values))), 3.3), layout="constrained")
        axes = figure.subplots()
        for i, (name, (score, colour)) in enumerate(bars.items()):
            x = [k + (i - 1) * 0.27 for k in range(len(values))]
            axes.bar(x, score.confusion.diagonal().numpy(), width=0.25, color=colour, label=name)
        names = [shortened(value) for value in values]
        axes.set_xticks(range(len(values)), names, rotation=40 if sum(map(len, names)) > 40 else 0)
        axes.tick_params(axis="x", length=0)
        axes.set(xlabel=f"{control} requested", ylabel="share that has it", ylim=(0, 1.02))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        headline(axes, "Accuracy against target")
    return figure


def scale_figure(samples: ScaleSamples, levels: Sequence[str], control: str) -> Figure:
    """Plot measured places on a scale against those requested."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.8, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.scatter(samples.requested.numpy(), samples.measured.numpy(), s=3, alpha=0.4, color=CTRL, linewidths=0)
        axes.plot([0, len(levels) - 1], [0, len(levels) - 1], color="#333", linewidth=1)
        axes.set_xticks(range(0, len(levels), 2), levels[::2])
        axes.set_yticks(range(0, len(levels), 2), levels[::2])
        axes.set(xlabel=f"{control} requested", ylabel=f"{control} measured")
        headline(axes, "Requested and measured")
    return figure


def sweep_figure(sweep: dict[str, list[SweepPoint]], target_accuracy: float, trained_steps: int) -> Figure:
    """Plot accuracy, adherence and diversity over the strength and over the number of steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind, trained in zip(panels, ("strength", "steps"), (1.0, trained_steps), strict=True):
            points = sweep[kind]
            x = [getattr(point, kind) for point in points]
            lines = {
                "accuracy": ([point.accuracy for point in points], CTRL, "o"),
                "still the class requested": ([point.class_accuracy for point in points], "#444", "s"),
                "diversity / target’s": ([point.diversity_ratio for point in points], "#c2661c", "^"),
            }
            for name, (y, colour, marker) in lines.items():
                if None not in y:
                    axes.plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=name)
            axes.axvline(trained, color=QUIET, linewidth=1, zorder=0)
            style = {"color": CTRL, "linewidth": 0.8, "linestyle": "--", "zorder": 0}
            axes.axhline(target_accuracy, **style, label="target’s accuracy")
            axes.set_xticks(x)
            axes.set(xlabel={"strength": "strength w", "steps": "sampling steps"}[kind])
            headline(axes, {"strength": "Strength", "steps": "Sampling steps"}[kind] + " (grey: as trained)")
        panels[0].set_ylim(bottom=0)  # shared, so set it after both are drawn: earlier it would cut the second off
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def gammas_figure(rows: list[dict[str, Any]], trained: float) -> Figure:
    """Plot accuracy, adherence and diversity over γ, and the gap: the rows are those of `Evaluation.metrics_at`."""
    lines = {
        "accuracy": ("accuracy", CTRL, "o"), "still the class requested": ("class_accuracy", "#444", "s"),
        "diversity / target’s": ("diversity_ratio", "#c2661c", "^"),
    }  # fmt: skip
    x = [row["gamma"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3), layout="constrained")
        panels = figure.subplots(1, 2)
        for name, (key, colour, marker) in lines.items():
            if (y := [row[key] for row in rows]) and None not in y:
                panels[0].plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=name)
        style = {"color": CTRL, "linewidth": 0.8, "linestyle": "--", "zorder": 0}
        known = [row for row in rows if row["target_accuracy"] is not None]
        targets = [row["target_accuracy"] for row in known]
        panels[0].plot([row["gamma"] for row in known], targets, **style, label="target’s accuracy")
        panels[0].set_ylim(bottom=0)
        certified = [row for row in rows if row["gap_nats"] is not None]
        gaps, errors = [row["gap_nats"] for row in certified], [2 * row["gap_stderr"] for row in certified]
        panels[1].errorbar([row["gamma"] for row in certified], gaps, errors, color=CTRL, marker="o", markersize=3.5)
        panels[1].set_ylim(bottom=min(0, panels[1].get_ylim()[0]))
        for axes, title in zip(panels, ("Samples at γ", "Gap (nats) ± 2 s.e."), strict=True):
            axes.axvline(trained, color=QUIET, linewidth=1, zorder=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{gamma:g}" for gamma in x])
            axes.minorticks_off()
            axes.set(xlabel="γ")
            headline(axes, f"{title} (grey: the run’s)")
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def plane_figure(run: Run, x: Tensor) -> Figure:
    """Draw the samples of `pictures.plane`."""
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
    folder: RunFolder, run: Run, metrics: RunMetrics, measurements: Measurements, samples: PictureSamples,
    records: list[dict[str, Any]], command: str,
) -> None:  # fmt: skip
    """Write the pictures of a run and a self-contained report.html; its classifier/ has been reported already.

    The records are those of its log, and the command is what the user typed.
    """
    control, values, classes, evaluation = run.name, run.values, run.classes, measurements.evaluation
    column_names = [""] * columns_of(run)
    if classes is not None:
        endings = distinct_endings([run.prior.class_names[c] for c in classes[:10]])
        column_names = [stacked(name) for name in endings]
    pictures = {f"Prior, which ignores {control}": samples.prior, "CTRL, same noise": samples.ctrl}
    axes = f"{control} requested", "measured by the ruler" if run.accuracy_by == "ruler" else "seen by the judge"
    figures = {
        "grid": grid_figure(pictures, [shortened(value) for value in values], column_names, control),
        "curves": curves_figure(records, evaluation.certificate),
        "accuracy": accuracy_figure(evaluation, values, control),
        "confusion": confusion_figure(evaluation.ctrl.confusion, values, *axes, "Confusion of CTRL, %"),
        "sweep": sweep_figure(metrics.sweep, evaluation.target.accuracy, run.config.steps),
    }
    if metrics.gammas:
        figures["gammas"] = gammas_figure(metrics.gammas, run.config.gamma)
    for name, scale in measurements.scales.items():
        figures[f"scale-{name}"] = scale_figure(scale, run.policy.controls[name].values, name)
    held_out = HeldOut.from_evaluation(evaluation, folder, samples.worst)
    if held_out and held_out.worst:
        figures["gaps"] = gaps_figure(evaluation)
    if samples.plane is not None:
        figures["plane"] = plane_figure(run, samples.plane)
    images = {name: embedded(folder.picture(name), figure) for name, figure in figures.items()}
    for i, name in enumerate(run.names):
        picture = "reliability" if i == 0 else f"reliability-{name}"
        path = shutil.copyfile(folder.classifier(name) / "reliability.png", folder.picture(picture))
        images[picture] = base64.b64encode(path.read_bytes()).decode()
    figures_by_name = metrics.as_dict()
    render(
        folder.report, "report.html", images=images, metrics=metrics, config=run.config, control=control,
        conditional=any(panel.classifier.conditional for panel in run.panels.values()),
        settings=flattened(run.config.model_dump()), names=run.names, values=values, real_outside=run.real_outside,
        condition=next((settings.condition for settings in run.config.controls if settings.condition), None),
        rows=by_class(evaluation, len(values)), command=command, held_out=held_out,
        verdict=Verdict.from_metrics(figures_by_name).lines(figures_by_name),
    )  # fmt: skip


def by_class(evaluation: Evaluation, classes: int) -> list[ClassRow]:
    """Return the row of each class: means over the prior's conditions c of which its pair is certified."""
    certificate, rows = evaluation.certificate, []
    breakdown = certificate.breakdown
    pairs, certified = certificate.pairs, certificate.certified.view(-1, classes)
    names = ("objective", "log_z", "gap", "stderr")
    tables = [getattr(pairs, name).view(-1, classes) for name in names]
    on_paths = certificate.on_paths.view(-1, classes)
    for k in range(classes):
        rests_on = next((mask[:, k] for mask in (certified, on_paths) if mask[:, k].any()), None)
        if rests_on is None:
            rows.append(ClassRow(float(tables[0][:, k].mean()), None, None, None, 0, 0))
            continue
        objective, log_z, gap, stderr = (table[rests_on, k] for table in tables)
        means = (float(value.mean()) for value in (objective, log_z, gap))
        error = float(breakdown.label_stderr[k])
        if not certified[:, k].any():
            error = cluster_error(tables[2][:, k], breakdown.clusters, mean_error(stderr), rests_on)
        rows.append(ClassRow(*means, error, int(certified[:, k].sum()), int(on_paths[:, k].sum())))
    return rows


def flattened(settings: dict[str, Any], under: str = "") -> dict[str, Any]:
    """Flatten nested settings to GROUP.KEY: VALUE."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        flat |= flattened(value, f"{under}{key}.") if isinstance(value, dict) else {f"{under}{key}": value}
    return flat
