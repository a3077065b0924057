"""Measure how soon the command line answers: docs/why/performance.md, bench/results/startup.json.

python bench/startup.py                  (a minute on a quiet core)

Every command starts in a process of its own, in turn over rounds; seconds are of the clock, medians over the rounds.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import evidence

ROUNDS = 15
MISSING = "train --prior digits --control y --data missing --out run"
PYTHON = {"pass": "pass", "import torch": "import torch", "import ctrl_diffusion": "import ctrl_diffusion"}
CTRL = {"ctrl --version": "--version", "ctrl --help": "--help", "ctrl train, data missing": MISSING}
COMMANDS = {name: ["-c", code] for name, code in PYTHON.items()}
COMMANDS |= {name: ["-m", "ctrl_diffusion", *arguments.split()] for name, arguments in CTRL.items()}
CODES = {"ctrl train, data missing": 2}


def seconds(name: str, folder: Path) -> float:
    """Return the seconds of one command from its start to its end; raise RuntimeError if it ends as it should not."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *COMMANDS[name]], cwd=folder, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - begin
    if done.returncode != CODES.get(name, 0):
        raise RuntimeError(f"{name}: exit code {done.returncode}. {done.stderr}")
    return taken


def main() -> None:
    """Measure all commands and write the figures."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with TemporaryDirectory() as folder:
        for i in range(ROUNDS + 1):
            for name, taken in times.items():
                value = seconds(name, Path(folder))
                if i:  # the first round reads the disk
                    taken.append(value)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    figures = {
        name: {
            "seconds": median, "over_pass": median / medians["pass"], "over_torch": median / medians["import torch"],
            "slowest": max(times[name]),
        }
        for name, median in medians.items()
    }  # fmt: skip
    evidence.write("startup", {"rounds": ROUNDS, "commands": figures})
    for name, row in figures.items():
        print(f"{name:26}{row['seconds']:7.3f} s{row['over_pass']:7.1f} × pass{row['over_torch']:7.3f} × torch")


if __name__ == "__main__":
    main()
