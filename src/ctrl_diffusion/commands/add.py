"""ctrl add."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    OTHER,
    Classifiers,
    Conditions,
    Controls,
    Datasets,
    Learner,
    Overwrite,
    Quick,
    Quiet,
    Settings,
    Track,
    asked,
    learn,
)


def add(
    run: Annotated[Path, typer.Argument(help="A run folder; it is not changed.")],
    out: Annotated[Path, typer.Option(help="The new run folder.")],
    data: Datasets = [],  # noqa: B006
    control: Controls = [],  # noqa: B006
    condition: Conditions = [],  # noqa: B006
    classifier: Classifiers = [],  # noqa: B006
    learner: Learner = None,
    config: Settings = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")] = None,
    track: Track = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", hidden=True)] = False,
    trust: Annotated[bool, typer.Option("--trust", hidden=True)] = False,
    quick: Quick = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Add a control to a finished run; its own controls stay as they are, to the bit."""
    from .jobs.train import add_job

    controls = asked(data, control, condition, classifier, skip_bad)
    told = {"learners": learner and learner.split(","), "track": track and track.split(",")}
    given = {"seed": seed, **told, **controls}
    learn(partial(add_job, run), given, config, out, quiet, trust, overwrite, quick)
