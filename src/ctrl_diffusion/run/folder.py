"""Name every file of a run folder and of a classifier's, and say in what state a run folder is.

config.yaml     everything needed to run again; an unknown key is an error
classifier/     p̂(y | x) with its held-out report; the judge of y and the reader of c, where there are any
control/        the control: adapter and embedding
                (of several controls both hold one folder for each, by name)
checkpoint/     until the run is finished: run.json, and the states from which training goes on
prompts.txt     the prompts of a text model, one a line, if they are more than 64
progress.jsonl  one line per probe and update
metrics.json, samples/, the pictures and report.html
"""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..system.checkpoint import Checkpoints
from ..system.files import undamaged, write_text
from ..system.folders import check_output, clear
from ..system.tracking import TRACKED
from .config import Config

CURVE = "curve.json"  # of how good p̂ is by the number of labels
PAGES = ("reliability.png", "confusion.png", "report.html")  # about a classifier
# the last file of each list marks a folder of that kind
CLASSIFIER_FILES = (
    "judge", "reader", CURVE, "curve.png", *PAGES, "support.safetensors", "classifier.safetensors", "classifier.json",
)  # fmt: skip
PROMPTS = "prompts.txt"
CHECKPOINT, DATA_FOLDERS = "checkpoint", ("data", "judge_data")  # the latter of a demo
RESULTS = (
    "control", "samples", "metrics.json", "report.html", "grid.png", "curves.png", "accuracy.png", "confusion.png",
    "reliability*.png", "sweep.png", "gammas.png", "plane.png", "gaps.png", "worst-*.png",
)  # fmt: skip
# the settings are removed first: a folder that has them can be resumed
RUN_FILES = ("config.yaml", CHECKPOINT, "classifier", *RESULTS, TRACKED, "progress.jsonl")
# the settings of the chain and of its target
TARGET = {
    "unconditional", "prompts", "guidance", "negative_prompt", "size", "classes", "hold_out", "weights", "gamma",
    "gammas", "steps", "sigma_end", "time_power", "focus",
}  # fmt: skip
KEPT = TARGET | {"prior", "mixed_precision", "vae_tiling"}  # a run with one more control has these of the old run
FIXED = TARGET | {"seed", "rank", "lora_alpha", "lora_targets", "learners"}  # training depends on them


@dataclass
class StartRecord:
    """Hold what was known of a run before its first update: checkpoint/run.json."""

    command: str  # that the user typed
    seconds: dict[str, float]  # that each part took
    labels: dict[str, int]  # the number of labelled images of each control
    dependence: dict[str, Any]  # of the labels of each pair of controls, for metrics.json
    fixed: dict[str, Any]  # the settings that may not change any more (`fixed_settings`)
    cut: bool = False  # whether the user made the training shorter than it would be by default


class RunFolder:
    """Name the files of a run folder, which need not be there yet, and tell its state."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config, self.log, self.prompts = path / "config.yaml", path / RUN_FILES[-1], path / PROMPTS
        self.metrics, self.report, self.samples = path / "metrics.json", path / "report.html", path / "samples"
        self.start, self.checkpoints = path / CHECKPOINT / "run.json", Checkpoints(path / CHECKPOINT)

    def __str__(self) -> str:
        return str(self.path)

    def picture(self, name: str) -> Path:
        """Return the path of a picture."""
        return self.path / f"{name}.png"

    def classifier(self, name: str) -> Path:
        """Return the folder of a control's classifier."""
        return self._part("classifier", name)

    def control(self, name: str) -> Path:
        """Return the folder of a control."""
        return self._part("control", name)

    def _part(self, kind: str, name: str) -> Path:
        """Return kind/NAME if config.yaml has several controls, else kind/."""
        several = self.config.is_file() and len(Config.read(self.config).names) > 1
        return self.path / kind / name if several else self.path / kind

    @property
    def has_begun(self) -> bool:
        """Whether a training has begun and is not finished."""
        return self.start.is_file()

    @property
    def is_finished(self) -> bool:
        """Whether everything a training leaves is there."""
        return self.report.is_file() and not self.has_begun

    @property
    def is_ours(self) -> bool:
        """Whether a training has written this folder, so that `--overwrite` may clear it."""
        return self.log.is_file()

    def check_free(self, overwrite: bool) -> None:
        """Refuse a folder that holds something, unless that is a run and may be overwritten; see `check_output`."""
        check_output(self.path, RUN_FILES[-1], overwrite)

    def clear(self, data: bool = False) -> None:
        """Remove an earlier run, and of a demo its data; mark the folder as a run's."""
        wrote = self.config.is_file() and f"prompts: {PROMPTS}\n" in self.config.read_text(encoding="utf-8")
        others = (*(DATA_FOLDERS if data else ()), *([PROMPTS] if wrote else []))
        clear(self.path, (RUN_FILES[0], *others, *RUN_FILES[1:]))
        self.log.touch()

    def clear_results(self) -> None:
        """Remove what an interrupted run wrote after its training."""
        clear(self.path, RESULTS)

    def clear_checkpoint(self) -> None:
        """Remove the states, first the file whose absence says that the run is finished."""
        self.start.unlink(missing_ok=True)
        clear(self.path, [CHECKPOINT])

    def read_config(self, *needed: str) -> Config:
        """Read config.yaml; refuse (ValueError) an absolute path of the `needed` keys that leads nowhere any more."""
        config = Config.read(self.config)
        groups = [("", config), *((f"controls.{i}.", control) for i, control in enumerate(config.controls))]
        for group, settings in groups:
            for key in needed:
                path = getattr(settings, key, None)  # of a hub, or embedded, it is no absolute path
                if path and Path(path).is_absolute() and not Path(path).exists():
                    advice = f"If it has moved, write its new place after {key}: there."
                    raise ValueError(f"{self.config}: {group}{key}: {path} is not there. {advice}")
        return config

    def read_metrics(self) -> dict[str, Any]:
        """Read metrics.json; refuse (ValueError) a damaged one."""
        with undamaged(self.metrics, "Remove it, and go on with the run to measure it again."):
            return TypeAdapter(dict[str, Any]).validate_json(self.metrics.read_bytes())

    def read_start(self) -> StartRecord:
        """Read what was known before the first update; refuse (ValueError) a damaged record."""
        with undamaged(self.start, "Begin the run again, with --overwrite."):
            return TypeAdapter(StartRecord).validate_json(self.start.read_bytes())

    def write_start(self, record: StartRecord) -> None:
        """Write what is known before the first update, with every digit of its figures."""
        write_text(self.start, json.dumps(asdict(record)))

    def check_unchanged(self, config: Config) -> None:
        """Refuse settings that training depends on and did not begin with."""
        old, new = self.read_start().fixed, fixed_settings(config)
        if changed := [
            f"{name} was {old[name]} and is {new[name]}" for name in new if new[name] != old.get(name, new[name])
        ]:
            raise ValueError(f"{self.config}: {'; '.join(changed)}. Put it back to go on, or begin a new run.")


def fixed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that may not change once training has begun, as JSON; paths may, as a run may be moved.

    Of a file of prompts its SHA-256 is taken.
    """
    settings = {"controls": config.names, **config.model_dump(mode="json", include=FIXED)}
    if isinstance(config.prompts, str):
        settings["prompts"] = sha256(Path(config.prompts).read_bytes()).hexdigest()
    return settings


def read_pages(folder: Path) -> dict[str, bytes]:
    """Read the pages about a classifier, by name."""
    return {name: (folder / name).read_bytes() for name in PAGES}
