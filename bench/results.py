"""Compare CTRL with the baselines on digits: docs/why/results.md.

python bench/results.py [ink] [ink,slant]       (hours; both, side by side, if none is named)
python bench/results.py page                    (write docs/why/results.md and its picture from bench/results/ again)

Trains a run for each on more labels than are compared (every seed draws its own from them), compares it with
`ctrl compare`, and writes bench/results/results-*.json, the pictures and docs/why/results.md. An interrupted comparison
goes on: runs/results/ keeps every row and every fit.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from statistics import mean
from typing import Any

import evidence
import matplotlib
import yaml
from evidence import DOCS, PICTURES, RESULTS, ROOT
from jinja2 import StrictUndefined, Template
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ctrl_diffusion.commands.jobs.compare import averaged, interval
from ctrl_diffusion.report.compare import plot_with_error
from ctrl_diffusion.report.style import STYLE, headline, plain_ticks, save_figure
from ctrl_diffusion.system.files import write_text

RUNS = ROOT / "runs" / "results"
LABELS, SEEDS = "50,100,200,500", "1,2,3"
DIFFERENCES = ("accuracy", "diversity_ratio", "frechet", "coverage")
# fewer updates than the demos have: 24 of these are trained
TASKS: dict[str, dict[str, Any]] = {
    "ink": {
        "title": "Ink, for each of ten digits", "short": "ink",
        "labels": 1000, "n": 400,
        "settings": {"weighted": {"updates": 300, "renoising": 75}, "adjoint": {"updates": 300}},
    },
    "ink,slant": {
        "title": "Ink and slant at once, eight digits", "short": "ink and slant",
        "labels": 600, "n": 384,
        "settings": {
            "weighted": {"updates": 400, "renoising": 100, "cache": 1500},
            "adjoint": {"updates": 400},
            "evaluation": {"prior_samples": 2000, "paths": 1000},
        },
    },
}  # fmt: skip
RIVALS = {
    "classifier-guidance": "classifier guidance", "free-guidance": "classifier-free guidance", "dps": "DPS",
    "mpgd": "MPGD",
}  # fmt: skip
COLUMNS = {
    "accuracy": ("accuracy", 3), "class_accuracy": ("digit read", 3), "diversity_ratio": ("diversity", 2),
    "frechet": ("Fréchet", 2), "kernel": ("kernel", 2), "coverage": ("coverage", 2), "gap_nats": ("gap, nats", 1),
}  # fmt: skip
COSTS = {"network_evaluations": "network", "gradient_evaluations": "gradients"}
STEERED = ("ctrl", *RIVALS)
PARTICLES = ("tds", "feynman-kac", "importance", "rejection", "best-of")


def start(task: str) -> subprocess.Popen:
    """Start the comparison of a task, or what is missing of it, after its run."""
    about, folder = TASKS[task], RUNS / task
    run = folder / "run"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "settings.yaml", yaml.safe_dump(about["settings"]))
    ctrl = [sys.executable, "-m", "ctrl_diffusion"]
    train = ["demo", "--controls", task, "--labels", about["labels"], "--config", folder / "settings.yaml"]
    compare = ["compare", run, "--labels", LABELS, "--seeds", SEEDS, "-n", about["n"], "--out", folder / "compared"]
    steps = [[*ctrl, *compare, "--resume"]]
    if not (run / "report.html").is_file():
        steps.insert(0, [*ctrl, *train, "--out", run, "--overwrite"])
    command = " && ".join(shlex.join(map(str, step)) for step in steps)
    # small networks gain nothing from a second thread, two tasks do
    return subprocess.Popen(["bash", "-c", command], env={**os.environ, "OMP_NUM_THREADS": "1"})


def slug(task: str) -> str:
    """Return a task as part of a file's name."""
    return f"results-{task.replace(',', '-')}"


def keep(task: str) -> None:
    """Write bench/results/results-TASK.json and copy the pictures of a comparison to docs/pictures/."""
    folder = RUNS / task / "compared"
    comparison = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    kept = {key: comparison[key] for key in ("about", "prior", "real", "chosen", "cells", "left_out")}
    kept["against"] = differences(comparison["rows"], comparison["chosen"])
    evidence.write(slug(task), {**kept, "rows": averaged(comparison["rows"], comparison["chosen"])})
    for picture in ("pareto", "labels"):
        shutil.copy(folder / f"{picture}.png", PICTURES / f"{slug(task)}-{picture}.png")


def differences(rows: list[dict[str, Any]], chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Subtract each rival's chosen setting from CTRL at w = 1 and at its chosen strength, on the same labels and noise.

    Returns:
        a row for each strength, rival and number of labels: (mean, half its interval) of each difference.
    """
    rows = [row for row in rows if not row["trial"]]
    by_key = {(row["method"], row["strength"], row["labels"], row["seed"]): row for row in rows}
    counts, table = sorted({row["labels"] for row in rows}), []
    for w in dict.fromkeys((1.0, chosen["ctrl"]["strength"])):
        for rival in RIVALS:
            strength = chosen[rival]["strength"]
            for n in counts:
                seeds = [seed for (name, s, m, seed) in by_key if (name, s, m) == ("ctrl", w, n)]
                pairs = [(by_key["ctrl", w, n, seed], by_key[rival, strength, n, seed]) for seed in seeds]
                less = {name: [ctrl[name] - other[name] for ctrl, other in pairs] for name in DIFFERENCES}
                table.append({"w": w, "rival": rival, "labels": n} | {k: interval(v) for k, v in less.items()})
    return table


def number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def with_half(row: dict[str, Any], name: str, digits: int, sign: str = "") -> str:
    """Return a figure with half its interval; a dash if it was not measured."""
    if name not in row:
        return "–"
    mean, half = row[name]
    return number(mean, digits, sign) + ("" if half is None else f" ± {half:.{digits}f}")


def span(values: list[float], digits: int) -> str:
    """Return the smallest and the largest value."""
    low, high = (number(round(value, digits) + 0.0, digits) for value in (min(values), max(values)))
    return low if low == high else f"{low} … {high}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def labels_table(result: dict[str, Any], labels: int, exact: float) -> str:
    """Return the rows of one number of labels, the chosen settings in bold, after the prior and an exact sampler."""
    unit, prior = result["about"]["prior_evaluations"], result["prior"]
    of_prior = [number(prior[key], digits) if key in prior else "–" for key, (_, digits) in COLUMNS.items()]
    lines = [
        ["the prior, no control", "0", *of_prior, "1.0×", "0.0×"],
        ["exact sampler, same p̂", "1", number(exact, 3), *["–"] * (len(COLUMNS) + 1)],
    ]
    if real := result.get("real"):  # not of a comparison made before real x were held out
        figures = [number(real[key], digits) if key in real else "–" for key, (_, digits) in COLUMNS.items()]
        lines.append([f"real data, {real['n']} for {real['n_samples']} samples", "–", *figures, "–", "–"])
    for row in (row for row in result["rows"] if row["labels"] == labels):
        settings = " ".join(f"{key} {value}" for key, value in row["settings"].items())
        name = f"**{row['title']}**" if row["chosen"] else row["title"]
        settings += f" ({row['seeds']} seeds)" if row["seeds"] < len(SEEDS.split(",")) else ""
        figures = [with_half(row, key, digits) for key, (_, digits) in COLUMNS.items()]
        costs = [f"{row[key][0] / unit:.1f}×" for key in COSTS]
        lines.append([f"{name} {settings}".strip(), f"{row['strength']:g}", *figures, *costs])
    return markdown(["method", "w", *(title for title, _ in COLUMNS.values()), *COSTS.values()], lines)


def difference_tables(result: dict[str, Any]) -> str:
    """Return a table for each strength of CTRL: what it has more of than each rival."""
    rows, parts = result["against"], []
    counts = sorted({row["labels"] for row in rows})
    for w in dict.fromkeys(row["w"] for row in rows):
        lines = []
        for rival, title in RIVALS.items():
            of_rival = sorted((r for r in rows if (r["w"], r["rival"]) == (w, rival)), key=lambda r: r["labels"])
            cells = [
                f"{with_half(row, 'accuracy', 3, '+')} ({with_half(row, 'diversity_ratio', 2, '+')})"
                for row in of_rival
            ]
            lines.append([title, *cells])
        head = f"CTRL at w = {w:g} less each rival at its chosen setting: accuracy (diversity)"
        parts.append(markdown([head, *(f"{n} labels" for n in counts)], lines))
    return "\n\n".join(parts)


def rows_of(result: dict[str, Any], method: str, strength: float | None = None) -> list[dict[str, Any]]:
    """Return a method's rows in the order of labels: those of its chosen setting, or of a strength."""
    rows = [row for row in result["rows"] if row["method"] == method]
    rows = [row for row in rows if (row["chosen"] if strength is None else row["strength"] == strength)]
    return sorted(rows, key=lambda row: row["labels"])


def means(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name][0] for row in rows if name in row]


def exact_accuracy(result: dict[str, Any]) -> list[float]:
    """Return the accuracy of an exact sampler with the same p̂ for each number of labels."""
    cells = result["cells"]
    return [mean(cell["target_accuracy"] for cell in cells if cell["labels"] == n) for n in labels_of(result)]


def labels_of(result: dict[str, Any]) -> list[int]:
    """Return the numbers of labels that are compared."""
    return sorted({cell["labels"] for cell in result["cells"]})


def overview_table(results: list[dict[str, Any]]) -> str:
    """Return the table the page begins with: every method at its chosen setting, CTRL at w = 1 besides."""
    lines = []
    order = ["ctrl", *RIVALS, "tds", "feynman-kac", "importance", "best-of", "rejection"]
    for method, strength in [("ctrl", 1.0), *((method, None) for method in order)]:
        groups = [rows_of(result, method, strength) for result in results]
        every = [row for group in groups for row in group]
        weights = sorted({row["strength"] for row in every})
        name = (
            f"{every[0]['title']}, w = {', '.join(f'{w:g}' for w in weights)}"
            if method in STEERED
            else every[0]["title"]
        )
        accuracies = [" ".join(number(value, 2) for value in means(group, "accuracy")) for group in groups]
        gaps = means(every, "gap_nats")
        unit = results[0]["about"]["prior_evaluations"]
        costs = [span([value / unit for value in means(every, key)], 0) for key in COSTS]
        diversity = span(means(every, "diversity_ratio"), 2)
        lines.append([name, *accuracies, diversity, span(gaps, 1) if gaps else "–", *costs])
    exact = [" ".join(number(value, 2) for value in exact_accuracy(result)) for result in results]
    lines.append(["exact sampler", *exact, *["–"] * (2 + len(COSTS))])
    if all(result.get("real") for result in results):
        diversity = span([result["real"]["diversity_ratio"] for result in results], 2)
        lines.append(["real data", *["–"] * len(exact), diversity, *["–"] * (1 + len(COSTS))])
    titles = [f"{about['short']}: accuracy with {LABELS.replace(',', ', ')} labels" for about in TASKS.values()]
    return markdown(["method", *titles, "diversity", "gap, nats", *COSTS.values()], lines)


def summary(results: list[dict[str, Any]]) -> str:
    """Return bench/results/in-short.md with the figures of these results."""
    w = results[0]["chosen"]["ctrl"]["strength"]
    figures: dict[str, Any] = {"w": f"{w:g}", "gap ctrl": span(pooled(results, "ctrl", "gap_nats", 1.0), 1)}
    figures["diversity free-guidance"] = span(pooled(results, "free-guidance", "diversity_ratio"), 2)
    figures["old grid"] = not all("nearest" in result["chosen"]["ctrl"] for result in results)
    lines = []
    for rival, title in RIVALS.items():
        nearest = []
        for result in results:
            measured = [row for row in result["rows"] if row["method"] == rival and "gap_nats" in row]
            gaps = [[row["gap_nats"][0] for row in measured if row["labels"] == n] for n in labels_of(result)]
            nearest += map(min, gaps)
        cells = []
        for strength, name in ((1.0, "accuracy"), (w, "accuracy"), (w, "diversity_ratio")):
            rows = [r for result in results for r in result["against"] if (r["w"], r["rival"]) == (strength, rival)]
            cells.append(span([row[name][0] for row in rows], 2))
        lines.append([title, *cells, span(nearest, 1)])
    head = ["CTRL less", "accuracy, w = 1", f"accuracy, w = {w:g}", f"diversity, w = {w:g}", "the rival's gap, nats"]
    figures["differences"] = markdown(head, lines)
    below = []
    for task, result in zip(TASKS, results, strict=True):
        figures[f"accuracy {task}"] = span(means(rows_of(result, "ctrl", w), "accuracy"), 3)
        ctrl = rows_of(result, "ctrl", 1.0)
        figures[f"diversity {task}"] = span(means(ctrl, "diversity_ratio"), 2)
        figures[f"gap {task}"] = span(means(ctrl, "gap_nats"), 1)
        of_task = [a - b for a, b in zip(exact_accuracy(result), means(ctrl, "accuracy"), strict=True)]
        figures[f"below {task}"] = span(of_task, 2)
        below += of_task
    figures["below exact"] = span(below, 2)
    unit = results[0]["about"]["prior_evaluations"]
    particles = [row for result in results for row in result["rows"] if row["method"] in PARTICLES]
    figures["cost of particles"] = span([value / unit for value in means(particles, "network_evaluations")], 0)
    text = (RESULTS / "in-short.md").read_text(encoding="utf-8")
    return Template(text, undefined=StrictUndefined).render(figures=figures).strip()


def pooled(results: list[dict[str, Any]], method: str, name: str, strength: float | None = None) -> list[float]:
    """Return a figure's means over all results."""
    return [value for result in results for value in means(rows_of(result, method, strength), name)]


def page() -> str:
    """Return docs/why/results.md: the overview, what it says, then every table."""
    results = [evidence.read(slug(task)) for task in TASKS]
    parts = [
        "# Results: CTRL and the baselines on digits",
        overview_table(results),
        "Every method at the setting that trials chose; means over three seeds, further down ± half of the 95 % "
        "interval. Made by `python bench/results.py`; [how it is compared](baselines.md#comparing).",
        "![Accuracy, diversity and gap against the number of labels](../pictures/results.png)",
        summary(results),
    ]
    for (task, about), result in zip(TASKS.items(), results, strict=True):
        parts.append(f"## {about['title']}")
        parts.append(f"![Accuracy against diversity and fidelity](../pictures/{slug(task)}-pareto.png)")
        parts.append(difference_tables(result))
        counts = sorted({row["labels"] for row in result["rows"]})
        for n, exact in zip(counts, exact_accuracy(result), strict=True):
            parts += [f"### {n} labels", labels_table(result, n, exact)]
            parts += [
                f"Seed {cell['seed']}: p̂ of {' and '.join(cell['uninformed'])} is not clearly better than chance. "
                "`ctrl train` would refuse it; here every method uses it."
                for cell in result["cells"]
                if cell["labels"] == n and cell["uninformed"]
            ]
    return "\n\n".join(parts) + "\n"


def picture() -> Figure:
    """Draw docs/pictures/results.png: accuracy, diversity and gap against the number of labels, a column for each task;
    CTRL as trained and at its chosen strength."""
    figures = {"accuracy": "accuracy", "diversity_ratio": "diversity", "gap_nats": "nats from the conditional, at most"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 8), layout="constrained")
        panels = figure.subplots(len(figures), len(TASKS), sharex=True, sharey="row")
        for column, task in enumerate(TASKS):
            result = evidence.read(slug(task))
            w = result["chosen"]["ctrl"]["strength"]
            lines = {
                "CTRL as trained, w = 1": ("ctrl", 1.0, {"zorder": 3}),
                f"CTRL at w = {w:g}": ("ctrl", w, {"zorder": 3, "linestyle": "--"}),
            }
            lines |= {title: (rival, result["chosen"][rival]["strength"], {}) for rival, title in RIVALS.items()}
            for axes, (name, title) in zip(panels[:, column], figures.items(), strict=True):
                for label, (method, strength, style) in lines.items():
                    rows = rows_of(result, method, strength)
                    x, y = [(row["labels"], 0.0) for row in rows], [row[name] for row in rows]
                    plot_with_error(axes, x, y, method, label=label, **style)
                if name in result["prior"]:
                    value = result["prior"][name]
                    axes.axhline(value, color="#999", linewidth=0.8, linestyle=":", label="the prior, no control")
                axes.set(xscale="log")
                ticks = sorted({row["labels"] for row in result["rows"]})
                axes.set_xticks(ticks, [str(n) for n in ticks])
                axes.xaxis.set_minor_formatter(NullFormatter())
                if column == 0:
                    axes.set_ylabel(title)
            panels[0, column].set(ylim=(0, 1.03))
            panels[1, column].set(ylim=(0, 1.2))
            panels[2, column].set(yscale="log", ylim=(0.3, 2000), xlabel="labels, of each control")
            plain_ticks(panels[2, column].yaxis)
            headline(panels[0, column], TASKS[task]["title"])
        handles = panels[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def main() -> None:
    tasks = [] if sys.argv[1:] == ["page"] else sys.argv[1:] or list(TASKS)
    if any([process.wait() for process in [start(task) for task in tasks]]):
        raise SystemExit(1)
    for task in tasks:
        keep(task)
    save_figure(PICTURES / "results.png", picture())
    write_text(DOCS / "why" / "results.md", page())


if __name__ == "__main__":
    main()
