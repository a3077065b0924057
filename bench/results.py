"""Compare CTRL with the baselines on digits: docs/results.md.

python bench/results.py [ink] [ink,slant]       (hours; both, side by side, if none is named)
python bench/results.py page                    (write docs/results.md and its picture from bench/results/ again)

Trains a run for each on more labels than are compared (every seed draws its own from them), compares it with
`ctrl compare`, and writes bench/results/results-*.json, the pictures and docs/results.md. An interrupted comparison
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
from evidence import DOCS, RESULTS, ROOT
from jinja2 import StrictUndefined, Template
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ctrl_diffusion.commands.jobs.compare import averaged, interval
from ctrl_diffusion.report.compare import with_error
from ctrl_diffusion.report.style import STYLE, headline, plain_ticks, save_figure
from ctrl_diffusion.system.files import write_text

RUNS = ROOT / "runs" / "results"
LABELS, SEEDS = "50,100,200,500", "1,2,3"
DIFFERENCES = ("accuracy", "diversity_ratio", "frechet", "coverage")
# fewer updates than the demos have: 24 of these are trained
TASKS: dict[str, dict[str, Any]] = {
    "ink": {
        "title": "Ink, for each of ten digits",
        "labels": 1000, "n": 400,
        "settings": {"weighted": {"updates": 300, "renoising": 75}, "adjoint": {"updates": 300}},
    },
    "ink,slant": {
        "title": "Ink and slant at once, eight digits",
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
    "accuracy": ("y as asked", 3), "class_accuracy": ("digit read", 3), "diversity_ratio": ("diversity", 2),
    "frechet": ("Fréchet", 2), "kernel": ("kernel", 2), "coverage": ("coverage", 2), "gap_nats": ("gap, nats", 1),
}  # fmt: skip


def compared(task: str) -> subprocess.Popen:
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


def cell(row: dict[str, Any], name: str, digits: int) -> str:
    """A figure with half its interval."""
    if name not in row:
        return "–"
    mean, half = row[name]
    return f"{mean:.{digits}f}".replace("-", "−") + ("" if half is None else f" ± {half:.{digits}f}")


def table(rows: list[dict[str, Any]], found: dict[str, Any], labels: int) -> str:
    """The rows of one number of labels, the chosen settings in bold, as Markdown."""
    head = ["method", "w", *(title for title, _ in COLUMNS.values()), "network", "gradients"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    unit = found["about"]["prior_evaluations"]
    for row in (row for row in rows if row["labels"] == labels):
        settings = " ".join(f"{key} {value}" for key, value in row["settings"].items())
        name = f"**{row['title']}**" if row["chosen"] else row["title"]
        settings += f" ({row['seeds']} seeds)" if row["seeds"] < len(SEEDS.split(",")) else ""
        figures = [cell(row, *column) for column in ((key, digits) for key, (_, digits) in COLUMNS.items())]
        costs = [f"{row[key][0] / unit:.1f}×" for key in ("network_evaluations", "gradient_evaluations")]
        lines.append(f"| {f'{name} {settings}'.strip()} | {row['strength']:g} | {' | '.join([*figures, *costs])} |")
    return "\n".join(lines)


def against(rows: list[dict[str, Any]], chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """CTRL at w = 1, and at the strength its trials chose, less each rival's chosen setting: (mean, half its interval)
    of the differences on the same labels and noise."""
    shown = [row for row in rows if not row["trial"]]
    at = {(row["method"], row["strength"], row["labels"], row["seed"]): row for row in shown}
    counts, found = sorted({row["labels"] for row in shown}), []
    for w in dict.fromkeys((1.0, chosen["ctrl"]["strength"])):
        for rival in RIVALS:
            theirs = chosen[rival]["strength"]
            for n in counts:
                seeds = [seed for (name, s, m, seed) in at if (name, s, m) == ("ctrl", w, n)]
                pairs = [(at["ctrl", w, n, seed], at[rival, theirs, n, seed]) for seed in seeds]
                less = {name: [mine[name] - other[name] for mine, other in pairs] for name in DIFFERENCES}
                found.append({"w": w, "rival": rival, "labels": n} | {k: interval(v) for k, v in less.items()})
    return found


def verdict(found: dict[str, Any]) -> str:
    """`against` as two tables in Markdown: what CTRL has more of than each rival."""
    rows, parts = found["against"], []
    for w in dict.fromkeys(row["w"] for row in rows):
        cost = "one evaluation a step, the prior's own cost" if w == 1 else "two evaluations a step"
        counts = sorted({row["labels"] for row in rows})
        parts.append(f"CTRL at w = {w:g} ({cost}) less the chosen setting of each, share of y as asked (diversity):")
        lines = [f"| | {' | '.join(f'{n} labels' for n in counts)} |", "|---" * (1 + len(counts)) + "|"]
        for rival, title in RIVALS.items():
            mine = sorted((r for r in rows if (r["w"], r["rival"]) == (w, rival)), key=lambda r: r["labels"])
            cells = [f"{signed(row, 'accuracy', 3)} ({signed(row, 'diversity_ratio', 2)})" for row in mine]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def signed(row: dict[str, Any], name: str, digits: int) -> str:
    """A difference with its sign and half its interval."""
    mean, half = row[name]
    return f"{mean:+.{digits}f}".replace("-", "−") + ("" if half is None else f" ± {half:.{digits}f}")


def between(values: list[float], digits: int) -> str:
    """The smallest and the largest."""
    low, high = (f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−") for value in (min(values), max(values)))
    return low if low == high else f"{low} … {high}"


def means_of(found: dict[str, Any], method: str, name: str, strength: float | None = None) -> list[float]:
    """A figure's means for each number of labels; of the chosen setting, or of a strength."""
    rows = [row for row in found["rows"] if row["method"] == method and name in row]
    return [row[name][0] for row in rows if (row["chosen"] if strength is None else row["strength"] == strength)]


def in_short() -> str:
    """bench/results/in-short.md, written for the figures of one run, with those of this."""
    tasks = [of_task(task) for task in TASKS]
    w, one = tasks[0]["chosen"]["ctrl"]["strength"], 1.0
    said: dict[str, Any] = {"w": f"{w:g}"}
    said["diversity_ratio free-guidance"] = between(
        [v for found in tasks for v in means_of(found, "free-guidance", "diversity_ratio")], 2
    )
    said["gap_nats ctrl"] = between([v for found in tasks for v in means_of(found, "ctrl", "gap_nats", one)], 1)
    for rival in RIVALS:
        nearer = []
        for found in tasks:
            strengths = {one, found["chosen"][rival]["strength"]}
            nearer += map(min, zip(*(means_of(found, rival, "gap_nats", at) for at in strengths), strict=True))
        said[f"gap_nats {rival}"] = between(nearer, 0)
    for task, found in zip(TASKS, tasks, strict=True):
        said[f"accuracy {task}"] = between(means_of(found, "ctrl", "accuracy", w), 3)
    for strength, what in ((one, "trained"), (w, "turned up")):
        for rival in RIVALS:
            rows = [r for found in tasks for r in found["against"] if (r["w"], r["rival"]) == (strength, rival)]
            for name in ("accuracy", "diversity_ratio"):
                said[f"{name} {what} less {rival}"] = between([row[name][0] for row in rows], 2)
    below_exact = [
        mean(cell["target_accuracy"] for cell in found["cells"] if cell["labels"] == n) - value
        for found in tasks
        for n, value in zip(map(int, LABELS.split(",")), means_of(found, "ctrl", "accuracy", one), strict=True)
    ]
    said["below exact"] = between(below_exact, 2)
    costs = [
        row["network_evaluations"][0] / found["about"]["prior_evaluations"]
        for found in tasks
        for row in found["rows"]
        if row["method"] in ("tds", "feynman-kac", "importance", "rejection", "best-of")
    ]
    said["cost of particles"] = between(costs, 0)
    for task, found in zip(TASKS, tasks, strict=True):
        said[f"diversity {task}"] = between(means_of(found, "ctrl", "diversity_ratio", one), 2)
    text = (RESULTS / "in-short.md").read_text(encoding="utf-8")
    return Template(text, undefined=StrictUndefined).render(said=said).strip()


def slug(task: str) -> str:
    """A task in the name of a file."""
    return f"results-{task.replace(',', '-')}"


def written(task: str) -> None:
    """Copy what came of a task into docs/."""
    folder = RUNS / task / "compared"
    found = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    rows = averaged(found["rows"], found["chosen"])
    about = {k: found[k] for k in ("about", "prior", "chosen", "cells")}
    about["against"] = against(found["rows"], found["chosen"])
    evidence.write(slug(task), {**about, "rows": rows})
    for picture in ("pareto", "labels"):
        shutil.copy(folder / f"{picture}.png", DOCS / f"{slug(task)}-{picture}.png")


def of_task(task: str) -> dict[str, Any]:
    """What was written of a task."""
    return evidence.read(slug(task))


def page() -> str:
    """docs/results.md: the picture that says it all, then every table."""
    parts = [
        "# Results: CTRL and the baselines on digits",
        "What else could be done with the same labels, on one footing ([how it is compared](baselines.md#comparing)). "
        "Made by `python bench/results.py`; means over three seeds ± half of the 95 % interval, the chosen setting of "
        "each method in bold. Network and gradients are evaluations of the network, and gradients through it, for each "
        "sample, in units of a sample of the prior.",
        "![y as asked, diversity and distance from the conditional against the number of labels](results.png)",
        in_short(),
    ]
    for task, about in TASKS.items():
        found = of_task(task)
        prior = found["prior"]
        parts.append(f"## {about['title']}")
        parts.append(f"![Accuracy against diversity and fidelity]({slug(task)}-pareto.png)")
        parts.append(
            f"Nobody asked, the prior has y in {prior['accuracy']:.3f}, Fréchet distance {prior['frechet']:.2f}."
        )
        parts.append(verdict(found))
        for n in sorted({row["labels"] for row in found["rows"]}):
            exact = [cell["target_accuracy"] for cell in found["cells"] if cell["labels"] == n]
            parts.append(f"**{n} labels** of each control; an exact sampler with the same p̂: {mean(exact):.3f}.")
            parts.append(table(found["rows"], found, n))
            for one in found["cells"]:
                if one["labels"] == n and one["uninformed"]:
                    parts.append(
                        f"With seed {one['seed']} p̂ of {' and '.join(one['uninformed'])} is not clearly better "
                        "than chance on held-out data, and `ctrl train` would refuse it; what follows it is compared "
                        "all the same."
                    )
    return "\n\n".join(parts) + "\n"


def overview() -> Figure:
    """What docs/results.md begins with: y, diversity and distance from the conditional against the number of labels, a
    column for each task; CTRL as it was trained, and at the strength that was chosen."""
    shown = {"accuracy": "y as asked", "diversity_ratio": "diversity", "gap_nats": "nats from the conditional, at most"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 8), layout="constrained")
        panels = figure.subplots(len(shown), len(TASKS), sharex=True, sharey="row")
        for column, task in enumerate(TASKS):
            found = of_task(task)
            w = found["chosen"]["ctrl"]["strength"]
            drawn = {
                "CTRL as trained, w = 1": ("ctrl", 1.0, {"zorder": 3}),
                f"CTRL at w = {w:g}": ("ctrl", w, {"zorder": 3, "linestyle": "--"}),
            }
            drawn |= {title: (rival, found["chosen"][rival]["strength"], {}) for rival, title in RIVALS.items()}
            for axes, (name, what) in zip(panels[:, column], shown.items(), strict=True):
                for label, (method, strength, how) in drawn.items():
                    mine = [r for r in found["rows"] if (r["method"], r["strength"]) == (method, strength)]
                    mine.sort(key=lambda row: row["labels"])
                    x, y = [(row["labels"], 0.0) for row in mine], [row[name] for row in mine]
                    with_error(axes, x, y, method, label=label, **how)
                if name in found["prior"]:
                    axes.axhline(
                        found["prior"][name], color="#999", linewidth=0.8, linestyle=":", label="the prior, not asked"
                    )
                axes.set(xscale="log")
                ticks = sorted({row["labels"] for row in found["rows"]})
                axes.set_xticks(ticks, [str(n) for n in ticks])
                axes.xaxis.set_minor_formatter(NullFormatter())
                if column == 0:
                    axes.set_ylabel(what)
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
    started = [compared(task) for task in tasks]
    if any([process.wait() for process in started]):
        raise SystemExit(1)
    for task in tasks:
        written(task)
    save_figure(DOCS / "results.png", overview())
    write_text(DOCS / "results.md", page())


if __name__ == "__main__":
    main()
