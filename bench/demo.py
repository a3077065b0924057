"""The demo's figures over seeds, with peak memory and share of time (`make bench`; about eight minutes a seed).

Writes docs/demo.json and the first seed's pictures, which README and docs quote. Figures depend on
seed, versions and thread count; seconds and memory are this machine's.
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

from ctrl_diffusion.files import write_json

DOCS = Path(__file__).parent.parent / "docs"
SEEDS = (0, 1, 2)


def main() -> None:
    rows = []
    with TemporaryDirectory() as folder:
        for seed in SEEDS:
            out = Path(folder) / str(seed)
            command = [sys.executable, "-m", "ctrl_diffusion.cli", "demo", "--seed", str(seed), "--out", str(out)]
            subprocess.run(command, check=True)
            metrics = json.loads((out / "metrics.json").read_text())
            del metrics["versions"]
            # of all children so far: the largest process; kilobytes on Linux
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
            if seed == SEEDS[0]:
                for picture in ("grid.png", "curves.png", "reliability.png"):
                    shutil.copy(out / picture, DOCS / picture)
            rows.append({"seed": seed, **metrics, "peak_memory_gb": round(peak, 2)})
    write_json(DOCS / "demo.json", rows)
    table = Table("seed", "prior", "ctrl", "target", "digit read", "diversity", "J", "log Z", "gap", "GB", "seconds")
    for row in rows:
        ctrl, gap = row["ctrl"], row["certificate"]
        table.add_row(
            str(row["seed"]), f"{row['prior']['accuracy']:.3f}", f"{ctrl['accuracy']:.3f}",
            f"{row['target']['accuracy']:.3f}", f"{ctrl['class_accuracy']:.3f}", f"{ctrl['diversity_ratio']:.3f}",
            f"{gap['objective_nats']:.2f}", f"{gap['log_z_nats']:.2f}",
            f"{gap['gap_nats']:.2f} ± {gap['gap_stderr']:.2f}", f"{row['peak_memory_gb']:.2f}",
            f"{row['seconds']['total']:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
