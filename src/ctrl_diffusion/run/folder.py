"""Decide what a run folder holds."""

import json
from pathlib import Path
from typing import Any

from ..system.tracking import TRACKED
from .config import Config

CHECKPOINT, LOG = "checkpoint", "progress.jsonl"  # in a run's folder

PAGES = ("reliability.png", "confusion.png", "report.html")  # about a classifier
BEGUN = "run.json"  # beside the states, until the run is finished
# what each job writes; the last tells its folder from anybody else's
CLASSIFIER_FILES = ("judge", "reader", *PAGES, "support.safetensors", "classifier.safetensors", "classifier.json")
RESULTS = (
    "control", "samples", "metrics.json", "report.html", "grid.png", "curves.png", "accuracy.png", "confusion.png",
    "reliability*.png", "sweep.png", "plane.png",
)  # fmt: skip
# the settings go first: with them in its folder a run can be gone on with
RUN_FILES = ("config.yaml", CHECKPOINT, "classifier", *RESULTS, TRACKED, LOG)
DATA_FOLDERS = ("data", "judge_data")  # of a demo
# the settings of the chain and of what is asked of it
TARGET = {
    "unconditional", "prompts", "guidance", "negative_prompt", "size", "classes", "gamma", "steps", "sigma_end",
    "time_power",
}  # fmt: skip
KEPT = TARGET | {"prior", "mixed_precision", "vae_tiling"}  # what a run with one control more has of the old one
FIXED = TARGET | {"seed", "rank", "lora_alpha", "lora_targets", "learners"}  # what was learned depends on them


def is_finished(folder: str | Path) -> bool:
    """Whether a run folder has all that a training leaves."""
    folder = Path(folder)
    return (folder / "report.html").is_file() and not (folder / CHECKPOINT / BEGUN).is_file()


def fixed(config: Config) -> dict[str, Any]:
    """What may not change once training has begun, as JSON has it; paths may, a run may be moved."""
    return {"controls": config.names, **config.model_dump(mode="json", include=FIXED)}


def check_unchanged(config: Config, folder: Path) -> None:
    """Refuse to go on with settings that training did not begin with, where what was learned depends on them."""
    begun, now = json.loads((folder / CHECKPOINT / BEGUN).read_text(encoding="utf-8"))["fixed"], fixed(config)
    if changed := [f"{name} was {begun[name]} and is {now[name]}" for name in now if now[name] != begun[name]]:
        raise ValueError(f"{folder}/config.yaml: {'; '.join(changed)}. Put it back to go on, or begin a new run.")


def pages_of(folder: Path) -> dict[str, bytes]:
    """The pages about a classifier, by name."""
    return {name: (folder / name).read_bytes() for name in PAGES}


def home(folder: Path, what: str, name: str) -> Path:
    """Where a run folder has the "control" or "classifier" of a control: a folder of its own if there are several."""
    own = folder / what / name
    return own if own.is_dir() else folder / what
