"""ctrl exact."""

from pathlib import Path
from typing import Annotated

import typer

from .options import OTHER, Overwrite, Quiet, Seed, phases, typed


def exact(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/exact"),
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, a tenth of the training: a smoke test.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Race the learners on priors whose exact conditional is known, and report how close they come."""
    from .jobs.testbed import exact_job

    with phases(quiet) as phase:
        rows = exact_job(out, quick, seed, overwrite, typed(), phase)
    if not quiet:
        typer.echo(f"{len(rows)} races\nreport: {out / 'report.html'}")
