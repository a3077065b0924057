"""Re-make the figures that README and docs quote: run commands as a user would, keep their figures and pictures.

python bench/figures.py NAME [SEED …]        (the seeds of the table below if none is given)

demo, digit, ink,slant   `ctrl demo` with peak memory (ten minutes a seed on two quiet cores; ink,slant half an hour)
add     a control that `ctrl add` adds later, against two trained together (three quarters of an hour a seed)
scale   ink as a number: values asked for against those measured (ten minutes a seed)
gamma   ink for several γ: the gap at each over the gap at 1, and beside a run of γ = 1 alone (two demos a seed)
unseen  ink on seven of the prior's ten classes, certified on the three others (a quarter of an hour)
apart   the same by a control that does not see the class (half an hour)
own     an unknown pipeline, of examples/textures.py, all settings the defaults (half an hour)
text    a text-to-image pipeline, of examples/text_digits.py, and ink (three quarters of an hour)
programs  what other programs' chain does with a control's LoRA file (half an hour)
exact   the testbed: every learner where the conditional is known (an hour)
bias    the testbed: where each baseline's bias comes from (ten minutes)

Figures go to bench/results/, pictures of the first seed to docs/pictures/. They depend on seed, versions and thread
count; seconds and memory are this machine's.
"""

import csv
import json
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import evidence
import numpy as np
import torch
import yaml
from evidence import PICTURES, ROOT
from PIL import Image
from rich import print_json
from rich.console import Console
from rich.table import Table

from ctrl_diffusion.commands.jobs.demos.digits import SETTINGS, labelled_digits
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.labelled import save_image, to_pixels, write_imagefolder
from ctrl_diffusion.run.run import Run

Metrics = dict[str, Any]
DEMO_COLUMNS = "seed prior ctrl target judge digit diversity J log_Z gap GB seconds"
ALONE_COLUMNS = "seed control alone target judge shift gap"
DEMO_PICTURES = "grid curves accuracy confusion reliability sweep"
PROGRAMS = {"ctrl": [sys.executable, "-m", "ctrl_diffusion"], "python": [sys.executable]}


def read_json(path: Path) -> Metrics:
    return json.loads(path.read_text(encoding="utf-8"))


def select(metrics: Metrics, keys: str) -> Metrics:
    """Return the entries named in `keys`, parted by spaces."""
    return {key: metrics[key] for key in keys.split()}


def metrics_of(folder: Path, seed: int) -> Metrics:
    """Return the metrics of folder/run without the versions of packages."""
    return {key: value for key, value in read_json(folder / "run" / "metrics.json").items() if key != "versions"}


def demo_row(folder: Path, seed: int) -> Metrics:
    """Return the metrics and the peak memory of the largest child process so far (kilobytes on Linux)."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return {"seed": seed, **metrics_of(folder, seed), "peak_memory_gb": round(peak, 2)}


def write_two_datasets(folder: Path, seed: int) -> None:
    """Write the two datasets of `ctrl demo --controls ink,slant` and a config for the training on each."""
    both = SETTINGS["ink,slant"]
    for control, pair in zip(both["controls"], labelled_digits("ink,slant", seed), strict=True):
        for kind, data in zip(("data", "judge_data"), pair, strict=True):
            write_imagefolder(folder / kind / control["name"], data)
            control = {**control, kind: f"{kind}/{control['name']}"}
        settings = {
            **select(both, "prior classes learners weighted evaluation focus patience"),
            "seed": seed,
            "controls": [control],
        }
        (folder / f"{control['name']}.yaml").write_text(yaml.safe_dump(settings))


def add_row(folder: Path, seed: int) -> Metrics:
    """Return the metrics of the new run, and whether the old run's samples are the same bytes, slant left out."""
    old, new = ([path.read_bytes() for path in sorted(folder.glob(f"{run}-samples/0*.png"))] for run in ("old", "new"))
    before, after = (read_json(folder / run / "metrics.json") for run in ("old", "new"))
    return {
        "seed": seed,
        "old_samples_unchanged": old == new,
        "ink_before": select(before["ctrl"], "accuracy accuracy_stderr"),
        **select(after, "controls ctrl certificate seconds"),
    }


def write_measured_ink(folder: Path, seed: int) -> None:
    """Write the ink demo's labelled digits with the ink as a number, and a config."""
    data = labelled_digits("ink", seed)[0][0]
    lines = ["file_name,digit,ink"]
    values = zip(to_pixels(data.x), data.labels["digit"], rulers.ink(data.x), strict=True)
    for i, (pixels, digit, ink) in enumerate(values):
        save_image(folder / "data" / f"{i}.png", pixels)
        lines.append(f"{i}.png,{digit},{ink:.6f}")
    (folder / "data" / "metadata.csv").write_text("\n".join(lines))
    classifier = {k: v for k, v in SETTINGS["ink"]["controls"][0]["classifier"].items() if k != "head"}
    settings = {"prior": "digits", "control": "ink", "kind": "scale", "data": "data", "condition": "digit"}
    settings |= {"ruler": "ink", "interval": "none", "classifier": classifier, "seed": seed}
    settings |= select(SETTINGS["ink"], "learners weighted focus patience")
    (folder / "scale.yaml").write_text(yaml.safe_dump(settings))


def write_ink(folder: Path, seed: int) -> None:
    """Write the labelled digits of the ink demo, and a config of its recipe that holds three classes out."""
    for kind, data in zip(("data", "judge_data"), labelled_digits("ink", seed)[0], strict=True):
        write_imagefolder(folder / kind, data)
    recipe = SETTINGS["ink"]
    settings = {"prior": "digits", "control": "ink", "data": "data", "judge_data": "judge_data", "hold_out": 3}
    settings |= select(recipe["controls"][0], "condition ruler interval classifier")
    settings |= {**select(recipe, "learners focus patience"), "weighted": {**recipe["weighted"], "updates": 1000}}
    (folder / "unseen.yaml").write_text(yaml.safe_dump({**settings, "adjoint": {"updates": 1200}, "seed": seed}))


def unseen_row(folder: Path, seed: int) -> Metrics:
    keys = "conditions prior target ctrl certificate held_out training seconds"
    return {"seed": seed, **select(metrics_of(folder, seed), keys)}


def scale_row(folder: Path, seed: int) -> Metrics:
    return {"seed": seed, **select(metrics_of(folder, seed), "scale prior target ctrl certificate classifier")}


def write_gammas(folder: Path, seed: int) -> None:
    (folder / "gammas.yaml").write_text(yaml.safe_dump({"gammas": [0.5, 1, 2, 4]}))


def ratio(first: float | None, second: float | None) -> float | None:
    """Return a ratio of two gaps; None where one is not certified."""
    return None if first is None or second is None else round(first / second, 3)


def gamma_row(folder: Path, seed: int) -> Metrics:
    """Return the certificate along γ, each gap over that at γ = 1, and that over the gap of the run of γ = 1 alone."""
    several, single = metrics_of(folder, seed), read_json(folder / "single" / "metrics.json")
    gaps = {row["gamma"]: row["gap_nats"] for row in several["gammas"]}
    return {
        "seed": seed,
        "gap_over_gap_at_1": {f"{gamma:g}": ratio(gap, gaps[1.0]) for gamma, gap in gaps.items()},
        "gap_over_single": ratio(gaps[1.0], single["certificate"]["gap_nats"]),
        **select(several, "gammas ctrl target seconds"),
        "single": select(single, "ctrl certificate seconds"),
    }


def own_metrics(folder: Path, seed: int) -> Metrics:
    """Return the metrics with those of `ctrl evaluate`."""
    return {**metrics_of(folder, seed), "evaluated_again": read_json(folder / "figures.json")["ctrl"]}


# less than the defaults: as much as a busy thread does in twenty minutes
TEXT = {
    "interval": "none",
    "focus": "none",
    "patience": None,
    "learners": ["weighted", "adjoint"],
    "guidance": 1.0,
    "rank": 32,
    "classifier": {"head": "ordinal", "grid": 1, "depth": 1, "augment": "any_side_up", "updates": 4000},
    "weighted": {"updates": 500, "cache": 800, "renoising": 125},
    "adjoint": {"updates": 260},
    "evaluation": {"prior_samples": 400, "paths": 1000, "probes": 5, "sweep_paths": 80},
}


def write_text_settings(folder: Path, seed: int) -> None:
    (folder / "text.yaml").write_text(yaml.safe_dump(TEXT))


def ink_borders(photos: Path) -> torch.Tensor:
    """Return the mean pixels, 0 … 255, half-way between the ink classes of the labelled images."""
    with (photos / "metadata.csv").open(encoding="utf-8") as file:
        labelled = [
            (int(row["ink"]), np.asarray(Image.open(photos / row["file_name"])).mean()) for row in csv.DictReader(file)
        ]
    classes = [[pixel for ink, pixel in labelled if ink == k] for k in (1, 2, 3, 4)]
    return torch.tensor([(max(low) + min(high)) / 2 for low, high in zip(classes, classes[1:], strict=False)])


def text_row(folder: Path, seed: int, each: int = 25) -> Metrics:
    """Return the metrics, those of `ctrl evaluate`, and the share of samples, `each` for every prompt and ink, whose
    mean pixel lies in the class of ink asked for."""
    pair = torch.arange(40).repeat_interleave(each)
    x = Run.load(folder / "run").sample(pair % 4, pair // 4, generator=torch.Generator().manual_seed(3))
    ink = torch.bucketize(((x + 1) * 127.5).double().flatten(1).mean(1), ink_borders(folder / "photos"))
    share = round(float((ink == pair % 4).double().mean()), 4)
    return {"seed": seed, "ink_measured": share, **own_metrics(folder, seed), "settings": TEXT}


# a short training, whose files do what longer ones do
PROGRAM_RUN = {
    **select(TEXT, "guidance rank classifier"),
    "steps": 28,
    "learners": ["contrast"],
    "contrast": {"updates": 400, "cache": 300},
    "patience": None,
    "evaluation": {"prior_samples": 400, "paths": 400, "probes": 2, "sweep_paths": 40},
}
STRENGTHS = (1.0, 0.8)  # of the weights


def write_program_settings(folder: Path, seed: int) -> None:
    (folder / "text.yaml").write_text(yaml.safe_dump(PROGRAM_RUN))


def program_rows(folder: Path, seed: int) -> Metrics:
    """Return the figures of the run's own chain and of A1111's, at each strength of the file."""
    chains = {"ours": metrics_of(folder, seed)}
    for strength in STRENGTHS:
        figures = read_json(folder / f"a1111-{strength:g}.json")
        chains[f"a1111 at {strength:g}"] = figures
        if "every_step" in figures:
            chains[f"a1111 at {strength:g}, every step"] = figures["every_step"]
    rows = {name: select(chain, "prior ctrl certificate") for name, chain in chains.items()}
    return {"seed": seed, "target": chains["ours"]["target"], "chains": rows, "settings": PROGRAM_RUN}


def print_programs(rows: list[Metrics]) -> None:
    """Print the table of docs/reference/models.md."""
    table = Table("chain", "ink as asked", "prior", "KL", "J", "gap")
    for row in rows:
        for name, chain in row["chains"].items():
            ctrl, gap = chain["ctrl"], chain["certificate"]
            shares = (f"{ctrl['accuracy']:.3f} ± {ctrl['accuracy_stderr']:.3f}", f"{chain['prior']['accuracy']:.3f}")
            nats = (decimals(ctrl["kl_nats"], 2), decimals(gap["objective_nats"], 2))
            table.add_row(name, *shares, *nats, f"{decimals(gap['gap_nats'], 2)} ± {decimals(gap['gap_stderr'], 2)}")
    Console(width=120).print(table)


def decimals(value: float | None, digits: int) -> str:
    """Return a figure for the table; blank where it was not measured."""
    return "" if value is None else f"{value:.{digits}f}"


def print_demo(rows: list[Metrics]) -> None:
    """Print the tables of README and docs/how-to/controls.md."""
    table = Table(*DEMO_COLUMNS.split())
    alone = Table(*ALONE_COLUMNS.split(), "s.e. from prior", "from target")
    for row in rows:
        ctrl, gap, seed = row["ctrl"], row["certificate"], str(row["seed"])
        shares = (row["prior"]["accuracy"], ctrl["accuracy"], row["target"]["accuracy"], ctrl["judge_accuracy"])
        shares += (ctrl["class_accuracy"], ctrl["diversity_ratio"])
        table.add_row(
            seed, *(decimals(share, 3) for share in shares), decimals(gap["objective_nats"], 2),
            decimals(gap["log_z_nats"], 2), f"{decimals(gap['gap_nats'], 2)} ± {decimals(gap['gap_stderr'], 2)}",
            decimals(row["peak_memory_gb"], 2), decimals(row["seconds"]["total"], 0),
        )  # fmt: skip
        for name, control in row.get("controls", {}).items():
            if isinstance(control, dict):
                single, nulled = control["alone"], control["nulled"]
                shares = (*select(single, "accuracy target judge_accuracy").values(), row["controls"]["null_shift"])
                nats = (single["gap_nats"], nulled["stderrs_from_prior"], nulled["stderrs_from_target"])
                alone.add_row(seed, name, *(decimals(s, 3) for s in shares), *(decimals(n, 2) for n in nats))
    for each in (table, alone) if alone.rows else (table,):
        Console(width=120).print(each)


@dataclass(frozen=True)
class Figures:
    """Describe how some figures are made.

    Args:
        commands: run one after the other; {out} is a temporary folder, {seed} the seed.
        result: the file in bench/results/, and its figures: a function of folder and seed, or a file of the folder.
        pictures: files of the temporary folder → files of docs/pictures/.
        seeds: a row of the file each; none: the file holds one job.
        prepare: writes into the temporary folder what the commands read.
        show: prints the rows; otherwise the entries of this name are printed.
    """

    commands: tuple[str, ...]
    result: tuple[str, Callable[[Path, int], Metrics] | str]
    pictures: dict[str, str]
    seeds: tuple[int, ...] = ()
    prepare: Callable[[Path, int], None] | None = None
    show: Callable[[list[Metrics]], None] | str = ""


def demo_figures(controls: str, file: str, pictures: dict[str, str]) -> Figures:
    command = f"ctrl demo --controls {controls} --seed {{seed}} --out {{out}}/run"
    return Figures((command,), (file, demo_row), pictures, (0, 1, 2), show=print_demo)


TABLE = {
    "demo": demo_figures(
        "ink", "demo",
        {f"run/{name}.png": f"{name}.png" for name in DEMO_PICTURES.split()},
    ),
    "digit": demo_figures("digit", "digit", {"run/grid.png": "digit.png"}),
    "ink,slant": demo_figures("ink,slant", "controls", {"run/plane.png": "plane.png"}),
    "add": Figures(
        (
            "ctrl train --config {out}/ink.yaml --out {out}/old --quiet",
            "ctrl add {out}/old --config {out}/slant.yaml --out {out}/new --quiet",
            "ctrl sample {out}/old --set ink=2 -n 64 --out {out}/old-samples --quiet",
            "ctrl sample {out}/new --set ink=2 -n 64 --out {out}/new-samples --quiet",
        ),
        ("add", add_row), {}, (0, 1, 2), write_two_datasets, "seed old_samples_unchanged ink_before controls",
    ),
    "scale": Figures(
        ("ctrl train --config {out}/scale.yaml --out {out}/run --quiet",),
        ("scale", scale_row), {"run/scale-ink.png": "scale.png"}, (0, 1, 2), write_measured_ink, "seed scale",
    ),
    "gamma": Figures(
        (
            "ctrl demo --controls ink --seed {seed} --out {out}/single",
            "ctrl demo --controls ink --seed {seed} --config {out}/gammas.yaml --out {out}/run",
        ),
        ("gamma", gamma_row), {"run/gammas.png": "gammas.png"}, (0,), write_gammas,
        "seed gap_over_gap_at_1 gap_over_single gammas",
    ),
    "unseen": Figures(
        ("ctrl train --config {out}/unseen.yaml --out {out}/run --quiet",),
        ("unseen", unseen_row), {}, (0,), write_ink, "seed conditions target ctrl held_out",
    ),
    "apart": Figures(
        ("ctrl train --config {out}/unseen.yaml -o sees_condition=false --out {out}/run --quiet",),
        ("unseen-apart", unseen_row), {}, (0,), write_ink, "seed conditions target ctrl held_out",
    ),
    "own": Figures(
        (
            "python {root}/examples/textures.py --out {out}",
            "ctrl classifier {out}/photos --control texture --prior {out}/pipeline --out {out}/classifier",
            "ctrl train --data {out}/photos --control texture --prior {out}/pipeline --classifier {out}/classifier "
            "--out {out}/run",
            "ctrl sample {out}/run --set texture=checks -n 16 --out {out}/checks",
            "ctrl evaluate {out}/run -n 600 --out {out}/figures.json",
        ),
        ("own", own_metrics), {"run/grid.png": "own.png"}, show="prior target ctrl classifier certificate seconds",
    ),
    "text": Figures(
        (
            "python {root}/examples/text_digits.py --out {out}",
            "ctrl train --prior {out}/pipeline --data {out}/photos --control ink --condition prompt "
            "--config {out}/text.yaml --seed {seed} --out {out}/run",
            "ctrl sample {out}/run --set ink=4 --class 'a handwritten seven' -n 16 --out {out}/sevens",
            "ctrl evaluate {out}/run -n 400 --out {out}/figures.json",
        ),
        ("text", text_row), {"run/grid.png": "text.png"}, (0,), write_text_settings,
        "seed ink_measured prior target ctrl classifier certificate seconds",
    ),
    "programs": Figures(
        (
            "python {root}/examples/text_digits.py --out {out} --autoencoder 150 --updates 500",
            "ctrl train --prior {out}/pipeline --data {out}/photos --control ink --condition prompt "
            "--config {out}/text.yaml --seed {seed} --out {out}/run",
            *(
                "ctrl evaluate {out}/run --as a1111 --sampler euler_a --steps 28 -n 400 "
                f"--strength {strength:g} --out {{out}}/a1111-{strength:g}.json"
                for strength in STRENGTHS
            ),
        ),
        ("programs", program_rows), {}, (0,), write_program_settings, print_programs,
    ),
    "exact": Figures(
        ("ctrl exact --out {out}/exact",), ("exact", "exact/exact.json"),
        {f"exact/{name}.png": f"exact-{name}.png" for name in ("density", "gap", "growth")},
    ),
    "bias": Figures(
        ("ctrl compare exact --out {out}/bias",), ("bias", "bias/bias.json"), {"bias/bias.png": "bias.png"}
    ),
}  # fmt: skip


def make(figures: Figures, seed: int, first: bool) -> None:
    """Run the commands in a temporary folder and keep their figures; the pictures too if the seed is the first."""
    file, source = figures.result
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if figures.prepare:
            figures.prepare(folder, seed)
        for command in figures.commands:
            program, *arguments = shlex.split(command.format(root=ROOT, out=folder, seed=seed))
            subprocess.run([*PROGRAMS[program], *arguments], check=True)
        metrics = read_json(folder / source) if isinstance(source, str) else source(folder, seed)
        for name, picture in figures.pictures.items() if first else ():
            shutil.copy(folder / name, PICTURES / picture)
    if figures.seeds:
        rows = evidence.add_row(file, metrics)
    else:
        evidence.write(file, metrics)
        rows = [metrics]
    if callable(figures.show):
        figures.show(rows)
    elif figures.show:
        print_json(data=select(metrics, figures.show))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TABLE:
        raise SystemExit(f"Which figures? {' '.join(TABLE)}")
    figures = TABLE[sys.argv[1]]
    for seed in [int(text) for text in sys.argv[2:]] or figures.seeds or (0,):
        make(figures, seed, seed == 0)


if __name__ == "__main__":
    main()
