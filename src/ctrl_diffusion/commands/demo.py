"""ctrl demo."""

from pathlib import Path
from typing import Annotated

import typer

from .options import OTHER, Learner, Overwrite, Quick, Quiet, Seed, Settings, job_options, summary


def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    controls: Annotated[str, typer.Option(help="ink; digit on the model without its classes; ink,slant.")] = "ink",
    learner: Learner = None,
    labels: Annotated[int | None, typer.Option(min=1, help="Labelled digits for each control.")] = None,
    config: Settings = None,
    seed: Seed = 0,
    quick: Quick = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Teach the embedded digits model a control it did not have, and certify it."""
    from ..run.config import check_code, read_settings
    from .jobs.demo import demo_job

    given = (read_settings(config) if config else {}) | {"seed": seed}
    check_code(given, {}, False, config)
    given |= {"learners": learner.split(",")} if learner else {}
    with job_options(quiet, False, overwrite, quick) as options:
        metrics = demo_job(given, out, options, controls, labels)
    if not quiet:
        typer.echo(summary(metrics, controls, out))
