"""Define `ctrl add`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .line import options as opt


def add(
    run: Annotated[Path, typer.Argument(help="A run folder; it is not changed.")],
    out: Annotated[Path, typer.Option(help="The new run folder.")],
    data: opt.Datasets = [],  # noqa: B006
    control: opt.Controls = [],  # noqa: B006
    condition: opt.Conditions = [],  # noqa: B006
    classifier: opt.Classifiers = [],  # noqa: B006
    learner: opt.Learner = None,
    time: opt.Time = None,
    updates: opt.Updates = None,
    config: opt.Settings = None,
    override: opt.Override = [],  # noqa: B006
    seed: opt.ConfigSeed = None,
    track: opt.Track = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", hidden=True)] = False,
    image: opt.Image = None,
    missing: opt.Missing = None,
    trust: opt.HiddenTrust = False,
    quick: opt.Quick = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = opt.OTHER,
) -> None:
    """Add a control to a finished run, whose own controls stay as they are."""
    from ..run.folder import KEPT
    from .jobs.train import add_job

    for text in override:
        if (key := text.partition("=")[0]) in KEPT:
            raise ValueError(f"-o {text}: {key} is that of {run}, whose controls depend on it. Leave it out.")
    options = {"time": time, "updates": updates, "seed": seed}
    options |= {"learners": learner and learner.split(","), "track": track and track.split(",")}
    options |= opt.control_values(data, control, condition, classifier, skip_bad, image, missing)
    values = opt.read_values(options, config, override, trust)
    opt.run_training(partial(add_job, run), values, out, quiet, trust=trust, overwrite=overwrite, quick=quick)
