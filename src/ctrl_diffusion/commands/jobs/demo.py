"""Train a demo control on the embedded model: three tasks on scikit-learn's digits.

ink        y is the stroke weight, the mean pixel from 0 (black) to 1, in four classes of equal size, named 1 (light)
           … 4 (heavy), for each of the prior's ten digits. The ruler that made the labels measures the samples too.
digit      y is the digit, and the prior is used by its null class. A judge fitted on other digits measures y.
ink,slant  two controls from two datasets that share no image; that of slant has no digit. Slant is whether the strokes
           lean left or right of the median, on eight digits: a 6 leans left and a 7 right by its shape.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from ...data.digits import DIGIT, INK, SLANT, UPRIGHT, VALUES, digits, ink_ruler, slant_ruler
from ...data.labelled import LabelledImages, write_imagefolder
from ...run.config import Config, is_list_of_groups, list_controls
from ...run.folder import DATA_FOLDERS, RunFolder
from ...run.prepare import prepare
from ...system.progress import DEFAULT, JobOptions, ignore
from ...system.strict import merged
from .train import reserved, start_training

# ink depends on neither place nor orientation, and its classes are ordered
INK_CLASSIFIER = {"head": "ordinal", "grid": 1, "depth": 1, "augment": "any_side_up", "updates": 8800}
INK_CONTROL = {"name": INK, "condition": DIGIT, "ruler": INK, "interval": "none", "classifier": INK_CLASSIFIER}
# ink is decided at the end of the chain: its control has no use for an interval, nor its chain for a focus; the figures
# of all demos in the docs were measured without
EVERYWHERE = {"focus": "none", "patience": None, "learners": ["weighted", "adjoint"]}
RENOISED = {"updates": 700, "renoising": 175}
# few updates: 250 labels leave too few to calibrate a classifier that is fitted until it is overconfident
SLANT_CLASSIFIER = {"head": "categorical", "grid": 4, "depth": 1, "augment": "half_turn", "updates": 500}
SETTINGS: dict[str, dict[str, Any]] = {
    "ink": {"prior": "digits", "controls": [INK_CONTROL], "weighted": RENOISED, **EVERYWHERE},
    "digit": {
        "prior": "digits",
        "unconditional": True,
        # the names are numbers, but not in an order; digits differ in where the strokes are
        "controls": [{"name": DIGIT, "interval": "none", "classifier": {"head": "categorical", "grid": 4, "depth": 2}}],
        # ten classes share the samples of the one condition
        "weighted": {"cache": 4000, "updates": 600, "renoising": 150},
        **EVERYWHERE,
        "adjoint": {"updates": 900},
        "evaluation": {"prior_samples": 4000, "paths": 2000},
    },
    "ink,slant": {
        "prior": "digits",
        "classes": list(UPRIGHT),
        "controls": [
            INK_CONTROL,
            {"name": SLANT, "ruler": SLANT, "interval": "none", "classifier": SLANT_CLASSIFIER},
        ],
        # eight combinations share the samples of a digit, the rarest one in a hundred
        "weighted": {"cache": 4000, **RENOISED},
        **EVERYWHERE,
        "adjoint": {"updates": 1200},
        "evaluation": {"prior_samples": 4000, "paths": 2000},
    },
}
LABELLED = {"ink": 500, "digit": 200, "ink,slant": 250}  # for each control
JUDGED = 200  # digits for the judge, at least


def labelled_digits(controls: str, seed: int, labels: int | None = None) -> list[tuple[LabelledImages, LabelledImages]]:
    """Draw a dataset for each control of a demo, evenly over its classes, and one of the other digits for its judge.

    The controls share no image with each other or with the judges; each has `labels` images (None: the demo's default).
    """
    x, c = digits()
    measured = {DIGIT: c, INK: ink_ruler(x), SLANT: slant_ruler(x)}
    usable = torch.isin(c, torch.tensor(SETTINGS[controls].get("classes", range(10))))
    rest, parts = usable.nonzero().squeeze(1).numpy(), []
    count = labels or LABELLED[controls]
    if (most := (len(rest) - JUDGED) // len(SETTINGS[controls]["controls"])) < count:
        raise ValueError(f"--labels {count}: of {len(rest)} digits {JUDGED} are for the judge. Ask for {most} at most.")
    for settings in SETTINGS[controls]["controls"]:
        y = measured[settings["name"]]
        rows, rest = train_test_split(rest, train_size=count, stratify=y[rest].numpy(), random_state=seed)
        parts.append(rows)

    def labelled(settings: dict[str, Any], rows: np.ndarray) -> LabelledImages:
        labels = {name: y for name, y in measured.items() if name in (settings["name"], settings.get("condition"))}
        return LabelledImages(x, labels, {name: VALUES[name] for name in labels})[rows]

    controls_parts = zip(SETTINGS[controls]["controls"], parts, strict=True)
    return [(labelled(settings, rows), labelled(settings, rest)) for settings, rows in controls_parts]


def demo_values(controls: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return a demo's settings under `values`, of which `classifier` goes to every control."""
    if controls not in SETTINGS:
        raise ValueError(f"the demo's controls are {' or '.join(SETTINGS)}; got {controls!r}.")
    others = {key: value for key, value in values.items() if key != "classifier"}
    settings = list_controls(merged(SETTINGS[controls], others))
    classifier = {"classifier": values["classifier"]} if "classifier" in values else {}
    rows = settings["controls"] if is_list_of_groups(settings["controls"]) else []
    return {**settings, "controls": [merged({"data": "-", **row}, classifier) for row in rows]}


def demo_job(
    values: dict[str, Any], out: str | Path, options: JobOptions = DEFAULT, controls: str = "ink",
    labels: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Do `train_job` with settings over the demo's, on labelled digits that are written into the run folder."""
    out, values = Path(out), demo_values(controls, values)
    folder, seed = RunFolder(out), Config.from_values(values).seed
    with reserved(folder, options.overwrite), TemporaryDirectory() as scratch:
        datasets = labelled_digits(controls, seed, labels)
        for control, pair in zip(values["controls"], datasets, strict=True):
            for kind, data in zip(DATA_FOLDERS, pair, strict=True):
                path = Path(scratch, kind, control["name"]) if len(datasets) > 1 else Path(scratch, kind)
                write_imagefolder(path, data)
                control[kind] = str(path)
        job = prepare(values, replace(options, say=ignore), SETTINGS[controls])  # these data we wrote ourselves
        moved = job.config.model_dump(include={"controls"})
        for control in moved["controls"]:
            for kind in DATA_FOLDERS:
                control[kind] = str(out.resolve() / Path(control[kind]).relative_to(Path(scratch).resolve()))
        return start_training(replace(job, config=job.config.with_(**moved)), folder, options, Path(scratch))
