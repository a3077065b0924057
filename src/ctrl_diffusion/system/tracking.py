"""Send metrics of a training to the TensorBoard files or services that the user named, by accelerate's trackers."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from . import ranks
from .files import one_line

TRACKED, PROJECT = "tracking", "ctrl"  # a folder of the run; the project's name at services


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that accelerate does not know, or whose package is not installed."""
    services = sorted(str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL)
    for name in names:
        if name not in services:
            raise ValueError(f"--track {name}: unknown. There are: {', '.join(services)}.")
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"--track {name}: its package is not installed. Try: pip install {name}")


class Tracking:
    """Hold the trackers of one run, on rank 0; without names every method is a no-op.

    A tracker that fails is dropped with a warning: no service is worth a training. Trackers may keep files in the run's
    folder; its settings are sent to services.
    """

    def __init__(self, names: list[str], folder: Path, settings: dict[str, Any]) -> None:
        self.names, self.folder, self.settings = names, folder, settings
        self.trackers: dict[str, GeneralTracker] = {}
        self.updates = 0  # of all stages

    def start(self, records: list[dict[str, Any]]) -> None:
        """Open the trackers after the records of a log; TensorBoard drops what it has of later updates."""
        self.close()
        self.updates = sum("loss" in record for record in records)
        if not self.names or not ranks.is_main():
            return
        folder = self.folder / TRACKED
        purge = {"purge_step": self.updates + 1 if self.updates else 0} if folder.is_dir() else {}
        folder.mkdir(exist_ok=True)
        options = {"tensorboard": purge, "wandb": {"name": self.folder.name, "dir": str(folder)}}
        unchanged = {"device_placement": False, "mixed_precision": "no", "project_dir": str(folder)}

        def open_tracker(name: str) -> None:
            accelerator = Accelerator(**unchanged, log_with=[name])
            accelerator.init_trackers(PROJECT, init_kwargs=options)
            (self.trackers[name],) = accelerator.trackers
            if name != "tensorboard":  # which would make a folder named by the time for them
                self.trackers[name].store_init_configuration(self.settings)

        self.each(open_tracker, self.names)

    def each(self, action: Callable[[str], None], names: Iterable[str]) -> None:
        """Call an action with every name; drop a tracker whose service raises anything."""
        for name in list(names):
            try:
                action(name)
            except Exception as error:
                self.trackers.pop(name, None)
                reason = one_line(error) or type(error).__name__
                warnings.warn(f"{name} is dropped: {reason}", RuntimeWarning, stacklevel=2)

    def log(self, record: dict[str, Any]) -> None:
        """Send the metrics of the log's next record, unless it repeats one as the control that was kept."""
        if "kept" not in record:
            self.updates += "loss" in record
            metrics = {key: v for key, v in record.items() if type(v) in (int, float) and key != "update"}
            self.log_metrics({f"{record['stage']}/{key}": v for key, v in metrics.items()})

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Send metrics by name, at the number of updates so far."""
        self.each(lambda name: self.trackers[name].log(metrics, step=self.updates), self.trackers if metrics else ())

    def close(self) -> None:
        """Finish all trackers."""
        self.each(lambda name: self.trackers[name].finish(), self.trackers)
        self.trackers = {}
