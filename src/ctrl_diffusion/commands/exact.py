"""Define `ctrl exact`."""

from pathlib import Path
from typing import Annotated

import typer

from .line.options import OTHER, Overwrite, Quiet, Seed, job_options


def exact(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/exact"),
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, a tenth of the training: a smoke test.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Race the learners on priors whose exact conditional is known, and report how close they come."""
    from .jobs.testbed import exact_job

    with job_options(quiet, False, overwrite, quick) as options:
        rows = exact_job(out, seed, options)
    if not quiet:
        typer.echo(f"{len(rows)} races\nreport: {out / 'report.html'}")
