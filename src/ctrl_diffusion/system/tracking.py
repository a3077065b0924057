"""Figures of a training for whoever follows it: TensorBoard's files or a service, through accelerate's trackers.

Nothing is sent anywhere unless it is asked for by name.
"""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from . import ranks

TRACKED, PROJECT = "tracking", "ctrl"  # in a run's folder; what services file a run under


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that accelerate does not know, or whose package is not there.

    Raises:
        ValueError: which, and what to do.
    """
    known = sorted(str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL)
    for name in names:
        if name not in known:
            raise ValueError(f"--track {name}: unknown. There are: {', '.join(known)}.")
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"--track {name}: its package is not installed. Try: pip install {name}")


class Tracking:
    """The trackers of one run, on rank 0; without any, nothing happens.

    One that fails is told no more, with a warning: no service is worth a training.

    Args:
        names: of the trackers.
        folder: the run's, in which they may keep files.
        settings: told to services.
    """

    def __init__(self, names: list[str], folder: Path, settings: dict[str, Any]) -> None:
        self.names, self.folder, self.settings = names, folder, settings
        self.trackers: dict[str, GeneralTracker] = {}
        self.updates = 0  # of all stages

    def begin(self, records: list[dict[str, Any]]) -> None:
        """Open the trackers after the records of a log; TensorBoard forgets what it was told of later updates.

        Warns:
            RuntimeWarning: one cannot be opened.
        """
        self.close()
        self.updates = sum("loss" in record for record in records)
        if not self.names or not ranks.is_main():
            return
        place = self.folder / TRACKED
        again = place.is_dir()
        place.mkdir(exist_ok=True)
        options = {
            "tensorboard": {"purge_step": self.updates + 1 if self.updates else 0} if again else {},
            "wandb": {"name": self.folder.name, "dir": str(place)},
        }

        def opened(name: str) -> None:
            # neither the device nor the precision is its business
            accelerator = Accelerator(
                device_placement=False, mixed_precision="no", log_with=[name], project_dir=str(place)
            )
            accelerator.init_trackers(PROJECT, init_kwargs=options)
            (self.trackers[name],) = accelerator.trackers
            if name != "tensorboard":  # it would make a folder named by the time for them
                self.trackers[name].store_init_configuration(self.settings)

        self.each(opened, self.names)

    def each(self, what: Callable[[str], None], names: Iterable[str]) -> None:
        """Do something with every tracker; what a service may fail by nobody can list."""
        for name in list(names):
            try:
                what(name)
            except Exception as error:
                self.trackers.pop(name, None)
                reason = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(f"{name} is told no more: {reason}", RuntimeWarning, stacklevel=2)

    def tell(self, record: dict[str, Any]) -> None:
        """Figures of the log's next record; the one that says which was kept was told when it was made."""
        if "kept" in record:
            return
        self.updates += "loss" in record
        figures = {key: v for key, v in record.items() if type(v) in (int, float) and key != "update"}
        self.show({f"{record['stage']}/{key}": v for key, v in figures.items()})

    def show(self, figures: dict[str, float]) -> None:
        """Figures by name, after the updates so far."""
        self.each(lambda name: self.trackers[name].log(figures, step=self.updates), self.trackers if figures else ())

    def close(self) -> None:
        """No more figures come."""
        self.each(lambda name: self.trackers[name].finish(), self.trackers)
        self.trackers = {}
