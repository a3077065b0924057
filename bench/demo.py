"""The demos' figures over seeds, with peak memory (`make bench`; about ten minutes a seed on two quiet cores,
ink,slant about half an hour on one busy thread).

python bench/demo.py ink|digit|ink,slant [SEED …]        (0 1 2 if none is given)

Writes the rows of these seeds into docs/demo.json, digit.json or controls.json and seed 0's pictures, which README and
docs quote. Figures depend on seed, versions and thread count; seconds and memory are this machine's.
"""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from ctrl_diffusion.system.files import write_json

DOCS = Path(__file__).parent.parent / "docs"
# what is written of each demo, and the pictures of seed 0
FILES = {"ink": "demo.json", "digit": "digit.json", "ink,slant": "controls.json"}
PICTURES = {
    "ink": {name: f"{name}.png" for name in ("grid", "curves", "accuracy", "confusion", "reliability", "sweep")},
    "digit": {"grid": "digit.png"},
    "ink,slant": {"plane": "plane.png"},
}


def measured(control: str, seed: int, out: Path) -> dict:
    """Run the demo and return its figures."""
    options = ["--controls", control, "--seed", str(seed), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "ctrl_diffusion", "demo", *options], check=True)
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["versions"]
    # of all children so far: the largest process; kilobytes on Linux
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return {"seed": seed, **metrics, "peak_memory_gb": round(peak, 2)}


def figure(value: float | None, digits: int) -> str:
    """A figure for the table; blank if nobody measured it."""
    return "" if value is None else f"{value:.{digits}f}"


def main() -> None:
    control, *seeds = sys.argv[1:]
    path = DOCS / FILES[control]
    with TemporaryDirectory() as folder:
        for seed in [int(text) for text in seeds] or [0, 1, 2]:
            out = Path(folder) / str(seed)
            row = measured(control, seed, out)
            for name, page in PICTURES[control].items() if seed == 0 else ():
                shutil.copy(out / f"{name}.png", DOCS / page)
            known = json.loads(path.read_text()) if path.is_file() else []
            rows = sorted([row, *(r for r in known if r["seed"] != seed)], key=lambda r: r["seed"])
            write_json(path, rows)
    heads = "seed prior ctrl target judge digit diversity J log_Z gap GB seconds"
    table = Table(*heads.split())
    for row in rows:
        ctrl, gap = row["ctrl"], row["certificate"]
        shares = (row["prior"]["accuracy"], ctrl["accuracy"], row["target"]["accuracy"], ctrl["judge_accuracy"])
        shares += (ctrl["class_accuracy"], ctrl["diversity_ratio"])
        nats = f"{gap['gap_nats']:.2f} ± {gap['gap_stderr']:.2f}"
        table.add_row(
            str(row["seed"]), *(figure(share, 3) for share in shares), figure(gap["objective_nats"], 2),
            figure(gap["log_z_nats"], 2), nats, figure(row["peak_memory_gb"], 2), figure(row["seconds"]["total"], 0),
        )  # fmt: skip
    Console(width=120).print(table)
    if "controls" in rows[0]:
        Console(width=120).print(by_control(rows))


def by_control(rows: list[dict]) -> Table:
    """The figures of each control alone."""
    heads = "seed control alone target judge shift gap"
    table = Table(*heads.split(), "s.e. from prior", "from target")
    for row in rows:
        for name, found in row["controls"].items():
            if isinstance(found, dict):
                alone, nulled = found["alone"], found["nulled"]
                shares = (alone["accuracy"], alone["target"], alone["judge_accuracy"], row["controls"]["null_shift"])
                away = (alone["gap_nats"], nulled["stderrs_from_prior"], nulled["stderrs_from_target"])
                table.add_row(str(row["seed"]), name, *(figure(s, 3) for s in shares), *(figure(a, 2) for a in away))
    return table


if __name__ == "__main__":
    main()
