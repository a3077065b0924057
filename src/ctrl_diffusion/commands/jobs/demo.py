"""Train a demo control on an embedded model, with labelled pictures that ship: those of digits, or of letters."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ...data.labelled import LabelledImages, write_imagefolder
from ...run.config import Config, is_list_of_groups, list_controls
from ...run.folder import DATA_FOLDERS, RunFolder
from ...run.prepare import prepare
from ...system.progress import DEFAULT, JobOptions, ignore
from ...system.strict import merged
from .demos import digits, letters
from .train import reserved, start_training


class Demos(NamedTuple):
    """Hold the demos on one prior."""

    settings: dict[str, dict[str, Any]]  # by their controls; the first is the default
    datasets: Callable[..., Sequence[tuple[LabelledImages, LabelledImages | None]]]  # see `labelled_digits`


DEMOS = {
    "digits": Demos(digits.SETTINGS, digits.labelled_digits),
    "letters": Demos(letters.SETTINGS, letters.labelled_letters),
}


def demos_on(prior: str) -> Demos:
    """Return the demos on a prior; refuse (ValueError) a prior without any."""
    if prior not in DEMOS:
        raise ValueError(f"the demos are on {' or '.join(DEMOS)}; got {prior!r}.")
    return DEMOS[prior]


def first_controls(prior: str) -> str:
    """Return the controls of the first demo on a prior, the default."""
    return next(iter(demos_on(prior).settings))


def settings_of(controls: str, prior: str) -> dict[str, Any]:
    """Return the settings of a demo; refuse (ValueError) a prior or controls that have none."""
    settings = demos_on(prior).settings
    if controls not in settings:
        raise ValueError(f"the demos on {prior} are {' or '.join(settings)}; got {controls!r}.")
    return settings[controls]


def demo_values(controls: str, values: dict[str, Any], prior: str = "digits") -> dict[str, Any]:
    """Return a demo's settings under `values`, of which `classifier` goes to every control."""
    others = {key: value for key, value in values.items() if key != "classifier"}
    settings = list_controls(merged(settings_of(controls, prior), others))
    classifier = {"classifier": values["classifier"]} if "classifier" in values else {}
    rows = settings["controls"] if is_list_of_groups(settings["controls"]) else []
    return {**settings, "controls": [merged({"data": "-", **row}, classifier) for row in rows]}


def demo_job(
    values: dict[str, Any], out: str | Path, options: JobOptions = DEFAULT, controls: str = "ink",
    labels: int | None = None, prior: str = "digits",
) -> dict[str, Any]:  # fmt: skip
    """Do `train_job` with settings over the demo's, on labelled pictures that are written into the run folder."""
    out, values = Path(out), demo_values(controls, values, prior)
    folder, seed = RunFolder(out), Config.from_values(values).seed
    with reserved(folder, options.overwrite), TemporaryDirectory() as scratch:
        datasets = DEMOS[prior].datasets(controls, seed, labels)
        for control, pair in zip(values["controls"], datasets, strict=True):
            for kind, data in zip(DATA_FOLDERS, pair, strict=True):
                if data is None:
                    continue
                path = Path(scratch, kind, control["name"]) if len(datasets) > 1 else Path(scratch, kind)
                write_imagefolder(path, data)
                control[kind] = str(path)
        # these data we wrote ourselves
        job = prepare(values, replace(options, say=ignore), settings_of(controls, prior))
        moved = job.config.model_dump(include={"controls"})
        for control in moved["controls"]:
            for kind in (name for name in DATA_FOLDERS if control[name]):
                control[kind] = str(out.resolve() / Path(control[kind]).relative_to(Path(scratch).resolve()))
        return start_training(replace(job, config=job.config.with_(**moved)), folder, options, Path(scratch))
