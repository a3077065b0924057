"""Rebuild the embedded run that `ctrl play` opens: `python bench/build_ink.py` (some minutes, one thread).

It is `ctrl demo` with a small adapter, from seed 0. What a page needs of its folder is kept: the settings, p̂ with its
judge and reader, the control, and metrics.json; not the data, the pictures or the log.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.run.folder import PAGES, RunFolder
from ctrl_diffusion.run.run import INK
from ctrl_diffusion.system.progress import JobOptions

SETTINGS = {
    "seed": 0, "rank": 16, "adjoint": {"updates": 800},
    "evaluation": {"prior_samples": 1000, "paths": 1000, "sweep_paths": 100},
}  # fmt: skip
KEPT = ("config.yaml", "classifier", "control", "metrics.json")
MOST_BYTES = 1_500_000


def advance(what: str, total: int):  # noqa: ANN201
    """Print that a phase begins."""
    print(f"{what}: {total}", flush=True)
    return lambda n=1, note="": None


def keep(run: Path, out: Path) -> None:
    """Copy what a page needs of a run folder; refuse more than `MOST_BYTES`."""
    for name in KEPT:
        copy = shutil.copytree if (run / name).is_dir() else shutil.copyfile
        copy(run / name, out / name)
    for page in (path for name in PAGES for path in out.rglob(name)):
        page.unlink()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise ValueError(f"{out} has {size:,} bytes, {MOST_BYTES:,} at most. Take a smaller rank.")
    print(f"{out}: {size:,} bytes")


def main() -> None:
    """Command line: train, then replace the embedded run folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=INK, help="the run folder to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        run, kept = RunFolder(Path(scratch, "run")), Path(scratch, "kept")
        kept.mkdir()
        demo_job(SETTINGS, run.path, JobOptions(phase=advance))
        keep(run.path, kept)
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.copytree(kept, args.out)


if __name__ == "__main__":
    main()
