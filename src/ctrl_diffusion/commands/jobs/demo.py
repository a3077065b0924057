"""The demos' material: scikit-learn's digits, the rulers, the offline datasets and the settings.

ink        y is the stroke weight: the mean pixel on a scale from 0 (black) to 1, in four even classes cut at the
           quartiles of the real digits and named 1 (light) … 4 (heavy), for each of the prior's ten digits. The true
           ink of any sample is measured by the ruler that made the labels, not by a network.
digit      y is the digit itself, and the prior never hears of it: it is asked for its null class. A judge fitted on
           other digits says what came out.
ink,slant  two controls from two datasets that share no image; the second does not know the digit. y of slant is the
           way the strokes lean, left or right of the median. It is trained and certified on eight digits: a 6 leans
           left and a 7 right by its shape, whoever wrote it.
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
from ...system.progress import DEFAULT, JobOptions
from ...system.strict import merged
from . import demo
from .train import reserved, start_training

# ink does not care where it is nor which side is up, and its classes are ordered
OF_INK = {"head": "ordinal", "grid": 1, "depth": 1, "augment": "any_side_up", "updates": 8800}
# few updates: of 250 labels too few are left to calibrate what is fitted until it is sure of itself
OF_SLANT = {"head": "categorical", "grid": 4, "depth": 1, "augment": "half_turn", "updates": 500}
SETTINGS: dict[str, dict[str, Any]] = {
    "ink": {
        "prior": "digits",
        "controls": [{"name": INK, "condition": DIGIT, "ruler": INK, "classifier": OF_INK}],
    },
    "digit": {
        "prior": "digits",
        "unconditional": True,
        # the names are numbers and yet in no order; what tells digits apart is where the strokes are
        "controls": [{"name": DIGIT, "classifier": {"head": "categorical", "grid": 4, "depth": 2}}],
        # ten classes share the samples of the one condition
        "weighted": {"cache": 4000},
        "adjoint": {"updates": 900},
        "evaluation": {"prior_samples": 4000, "paths": 2000},
    },
    "ink,slant": {
        "prior": "digits",
        "classes": list(UPRIGHT),
        "controls": [
            {"name": INK, "condition": DIGIT, "ruler": INK, "classifier": OF_INK},
            {"name": SLANT, "ruler": SLANT, "classifier": OF_SLANT},
        ],
        # eight combinations share the samples of a digit, and the rarest comes once in a hundred
        "weighted": {"cache": 4000},
        "adjoint": {"updates": 1200},
        "evaluation": {"prior_samples": 4000, "paths": 2000},
    },
}
LABELLED = {"ink": 500, "digit": 200, "ink,slant": 250}  # for each control
JUDGED = 200  # digits, at least


def labelled_digits(controls: str, seed: int, labels: int | None = None) -> list[tuple[LabelledImages, LabelledImages]]:
    """For each control of a demo its offline dataset, drawn evenly over its classes, and digits nobody else was given.

    The datasets share no image; the second of each pair is for the judge.

    Args:
        controls: of SETTINGS.
        seed: of the draw.
        labels: for each control; None for what the demo has.

    Raises:
        ValueError: so many labels leave too few digits for the judge.
    """
    x, c = digits()
    known = {DIGIT: c, INK: ink_ruler(x), SLANT: slant_ruler(x)}
    wanted = torch.isin(c, torch.tensor(SETTINGS[controls].get("classes", range(10))))
    rest, drawn = wanted.nonzero().squeeze(1).numpy(), []
    count = labels or LABELLED[controls]
    if (most := (len(rest) - JUDGED) // len(SETTINGS[controls]["controls"])) < count:
        raise ValueError(f"--labels {count}: of {len(rest)} digits {JUDGED} are for the judge. Ask for {most} at most.")
    for settings in SETTINGS[controls]["controls"]:
        y = known[settings["name"]]
        rows, rest = train_test_split(
            rest, train_size=count, stratify=y[rest].numpy(), random_state=seed
        )  # fmt: skip
        drawn.append(rows)

    def of(settings: dict[str, Any], rows: np.ndarray) -> LabelledImages:
        labels = {name: y for name, y in known.items() if name in (settings["name"], settings.get("condition"))}
        return LabelledImages(x, labels, {name: VALUES[name] for name in labels})[rows]

    return [(of(s, rows), of(s, rest)) for s, rows in zip(SETTINGS[controls]["controls"], drawn, strict=True)]


def demo_values(controls: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return a demo's settings under `values`, of which `classifier` goes to every control.

    Raises:
        ValueError: no such demo.
    """
    if controls not in SETTINGS:
        raise ValueError(f"the demo's controls are {' or '.join(SETTINGS)}; got {controls!r}.")
    others = {key: value for key, value in values.items() if key != "classifier"}
    settings = list_controls(merged(SETTINGS[controls], others))
    classifier = {"classifier": values["classifier"]} if "classifier" in values else {}
    rows = settings["controls"] if is_list_of_groups(settings["controls"]) else []
    return {**settings, "controls": [merged({"data": "-", **row}, classifier) for row in rows]}


def demo_job(
    values: dict[str, Any],
    out: str | Path,
    options: JobOptions = DEFAULT,
    controls: str = "ink",
    labels: int | None = None,
) -> dict[str, Any]:
    """Do `train_job` on the embedded prior and labelled digits, which are written into the run folder.

    Args:
        values: settings by the names of `Config`, over those of the demo.
        out, options: see `train_job`.
        controls: of SETTINGS.
        labels: for each control; None for what the demo has.
    """
    out, values = Path(out), demo_values(controls, values)
    folder = RunFolder(out)
    seed = Config.from_values(values).seed
    with reserved(folder, options.overwrite), TemporaryDirectory() as scratch:
        datasets = demo.labelled_digits(controls, seed, labels)
        for control, pair in zip(values["controls"], datasets, strict=True):
            for kind, data in zip(DATA_FOLDERS, pair, strict=True):
                path = Path(scratch, kind, control["name"]) if len(datasets) > 1 else Path(scratch, kind)
                write_imagefolder(path, data)
                control[kind] = str(path)
        job = prepare(values, options)
        moved = job.config.model_dump(include={"controls"})
        for control in moved["controls"]:
            for kind in DATA_FOLDERS:
                control[kind] = str(out.resolve() / Path(control[kind]).relative_to(Path(scratch).resolve()))
        return start_training(replace(job, config=job.config.with_(**moved)), folder, options, Path(scratch))
