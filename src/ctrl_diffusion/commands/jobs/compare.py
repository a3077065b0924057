"""Compare CTRL and the baselines: same prior and chain, labels, p̂ where one is used, judge, samples and noise.

What a method fits on labels is fitted anew for each number of labels and each seed, on none of the judge's images. Its
settings are chosen by trials on the run's own models, which begin with one grid of strengths for all and widen it until
the best lies inside (`guide/strength.py`); the rows of trials stand apart. Best is one rule for all, the largest
harmonic mean of accuracy and coverage; of a chain of Gaussian steps the strength of the least gap lies inside, too.

compare.json    the rows, written as they finish
cells/          the fitted models, by number of labels and seed
report.html     the table, with pareto.png and labels.png
"""

import hashlib
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from ...report.compare import write_compare_report
from ...run.config import check_code
from ...run.run import Run
from ...system.files import write_json
from ...system.folders import check_output, clear
from ...system.progress import DEFAULT, JobOptions
from .comparing.comparison import STRENGTHS, Comparison
from .comparing.methods import METHODS, Rows, choose_settings
from .inspect import calls

COMPARE_FILES = ("compare.json", "cells", "pareto.png", "labels.png", "report.html")


def compare_job(
    folder: Path, out: Path | None = None, methods: Sequence[str] = (), labels: Sequence[int] = (),
    strengths: Sequence[float] = STRENGTHS, seeds: Sequence[int] = (), n: int = 1000, resume: bool = False,
    options: JobOptions = DEFAULT,
) -> dict[str, Any]:  # fmt: skip
    """Compare a run's control with the baselines; return the contents of compare.json.

    Args:
        folder, out: of the run, and the folder to write, its compare/ if None.
        methods: names in METHODS; all if empty.
        labels: how many of each control; all there are if empty. Another number, or seed, than the run's is fitted and
            trained anew.
        strengths: trials begin with these.
        seeds: of fits and noise; the run's if empty.
        n: samples for each row, at least.
        resume: keep the rows of an earlier comparison and compute the missing ones.

    Raises:
        ValueError: an unknown method, too few labels, or a run that cannot be compared.
    """
    out, path = out or folder / "compare", (out or folder / "compare") / COMPARE_FILES[0]
    methods = list(methods or METHODS)
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"--methods {unknown[0]}: unknown. There are: {', '.join(METHODS)}.")
    if not resume:
        check_output(out, COMPARE_FILES[0], options.overwrite)
    run = Run.load(folder, trust=options.trust)
    check_code(run.config.model_dump(), {}, options.trust, folder / "config.yaml")
    about = {"run": hash_weights(folder), "n": n, "prior_evaluations": len(run.times), "accuracy_by": run.accuracy_by}
    about |= {"network_calls": calls(run.prior), "judge_apart": True}  # no row is of a method that met the judge's x
    earlier = {"about": about, "rows": [], "cells": [], "left_out": []}
    if resume and path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["about"] != about:
            raise ValueError(
                f"{out} compares another run, or with another -n, or was begun by an earlier version. Choose another "
                "--out, or --overwrite."
            )
    known = earlier["rows"], earlier["cells"], earlier["left_out"]
    comparison = Comparison(run, out, methods, tuple(strengths), n, *known, options)
    cells = [(n, seed) for seed in seeds or (run.config.seed,) for n in labels or (comparison.labelled,)]
    for cell in cells:
        if cell != (comparison.labelled, run.config.seed):  # the run itself, whose controls may have unlike numbers
            comparison.split(*cell)  # raises before anything is done
    for data in comparison.data.values():
        options.say(data.about)
    models, prior, real = comparison.run_models(), comparison.prior(), comparison.real()  # raise before it is cleared
    if not resume:
        clear(out, COMPARE_FILES)
    (out / "cells").mkdir(parents=True, exist_ok=True)

    def write() -> dict[str, Any]:
        chosen, rows = choose_settings(comparison.rows, comparison.left_out), comparison.rows
        result = {"about": about, "prior": prior, "real": real, "chosen": chosen, "cells": comparison.cells}
        result |= {"left_out": comparison.left_out, "rows": rows}
        write_json(path, result)
        return result

    for _ in comparison.compute(models, cells):
        write()
    result = write()
    rows, command = averaged(comparison.rows, result["chosen"]), options.command or "ctrl compare"
    write_compare_report(out, rows, result, command, version("ctrl-diffusion"))
    return result


def hash_weights(folder: Path) -> str:
    """Hash the weights of a run: the rows of another run must not be added to these."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        if path.relative_to(folder).parts[0] in ("classifier", "control"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def interval(values: Sequence[float], error: float | None = None) -> tuple[float, float | None]:
    """Return the mean over seeds and half its 95 % interval (Student's t); of one value from its standard error."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, None if error is None else 1.96 * error
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return mean, float(student.ppf(0.975, len(values) - 1)) * spread


def averaged(rows: Rows, chosen: dict[str, dict[str, Any]]) -> Rows:
    """Average rows over seeds: one for each method, number of labels and setting, its figures (mean, half interval)."""
    groups: dict[str, Rows] = {}
    for row in rows:
        if not row["trial"]:
            key = {name: row[name] for name in ("method", "labels", "strength", "settings")}
            groups.setdefault(json.dumps(key), []).append(row)
    averages = []
    for text, members in groups.items():
        key, best = json.loads(text), chosen[members[0]["method"]]
        figures = {}
        for name in members[0]:
            values = [row[name] for row in members if row[name] is not None]
            if name not in (*key, "seed", "trial", "accuracy_stderr") and values:
                error = members[0].get({"accuracy": "accuracy_stderr", "gap_nats": "gap_stderr"}.get(name, ""))
                figures[name] = interval(values, error)
        is_chosen = all(key[name] == best[name] for name in ("strength", "settings"))
        title = METHODS[key["method"]].title if key["method"] in METHODS else key["method"]
        is_nearest = not key["settings"] and best.get("nearest", {}).get("strength") == key["strength"]
        marks = {"title": title, "chosen": is_chosen, "nearest": is_nearest, "seeds": len(members)}
        averages.append({**key, **marks, **figures})
    return averages


def in_words(result: dict[str, Any]) -> str:
    """Format the rows at the chosen settings, and at the least gap, as a table for a terminal."""
    head = ("w", "labels", "accuracy", "diversity", "Fréchet", "coverage", "gap, nats", "network")
    lines = [f"{'':<26}" + "".join(f"{name:>11}" for name in head)]
    if real := result["real"]:
        counts = f"   {real['n']} x for {real['n_samples']} samples"
        lines.append(f"{'real data':<26}{'':>33}{figures_in(real)}{counts}")
    for row in averaged(result["rows"], result["chosen"]):
        if row["chosen"] or row["nearest"]:
            gap = f"{row['gap_nats'][0]:.2f}{'*' if row['nearest'] else ''}" if "gap_nats" in row else "–"
            cost = row["network_evaluations"][0] / result["about"]["prior_evaluations"]
            means = {name: value[0] for name, value in row.items() if isinstance(value, tuple)}
            lines.append(
                f"{row['title']:<26}{row['strength']:>11g}{row['labels']:>11}{means['accuracy']:>11.3f}"
                f"{figures_in(means)}{gap:>11}{cost:>10.1f}×"
            )
    if any("*" in line for line in lines):
        lines.append("* the strength with the least gap among the trials")
    return "\n".join(lines)


def figures_in(row: dict[str, Any]) -> str:
    """Format the columns of fidelity, a dash for what was not measured."""
    values = (row.get(name) for name in ("diversity_ratio", "frechet", "coverage"))
    return "".join(f"{'–' if value is None else f'{value:.2f}':>11}" for value in values)
