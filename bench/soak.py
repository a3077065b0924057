"""Measure the growth of memory and open files over 2,000 updates of the digits demo: bench/results/speed.json.

python bench/soak.py      (about a quarter of an hour on one quiet thread)

Batches are small; log, checkpoints, probes and TensorBoard's files are those of any job.
"""

import json
import os
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from race import keep, resident

from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.line.options import job_options
from ctrl_diffusion.system.progress import JobOptions

UPDATES, EVERY, WINDOW = 2000, 10, 20  # readings are medians over WINDOW, of every tenth update
BATCH = {"batch": 16}
SETTINGS = {
    "learners": ["weighted", "adjoint"],
    "weighted": {"updates": UPDATES // 4, "cache": 100, **BATCH},
    "adjoint": {"updates": UPDATES - UPDATES // 4, **BATCH},
    "evaluation": {"prior_samples": 100, "paths": 80, "probes": 20, "sweep_paths": 40},
    "track": ["tensorboard"],
}


def main() -> None:
    readings: dict[str, list[tuple[float, int]]] = {}
    with TemporaryDirectory() as folder, job_options("--quiet" in sys.argv) as options:

        def phase(what: str, total: int):  # noqa: ANN202
            advance, done, rows = options.phase(what, total), 0, readings.setdefault(what, [])

            def step(n: int = 1, note: str = "") -> None:
                nonlocal done
                done += n
                if done % EVERY == 0 and what.startswith("learner"):
                    rows.append((resident(), len(os.listdir("/proc/self/fd"))))
                advance(n, note)

            return step

        demo_job(SETTINGS, Path(folder) / "run", JobOptions(phase))
    rows = [row for stage in ("weighted", "adjoint") for row in readings[f"learner: {stage}"]]
    megabytes, files = zip(*rows, strict=True)
    first, last = (statistics.median(part) for part in (megabytes[:WINDOW], megabytes[-WINDOW:]))
    figures = {
        "updates": UPDATES,
        "megabytes": {"first": first, "last": last, "most": max(megabytes)},
        "growth": last / first - 1,
        "open_files": [max(files[:WINDOW]), max(files[-WINDOW:])],
    }
    keep("soak", figures)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
