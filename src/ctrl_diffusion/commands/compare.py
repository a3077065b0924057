"""Define `ctrl compare`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from .line.options import OTHER, Overwrite, Quiet, Trust, job_options


def compare(
    run: Annotated[Path, typer.Argument(help="A run folder; or exact, the testbed.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; left out, RUN/compare.")] = None,
    methods: Annotated[str | None, typer.Option(help="Of these only, by name; a wrong one lists them.")] = None,
    labels: Annotated[str | None, typer.Option(help="How many of each control; left out, all but its judge's.")] = None,
    strengths: Annotated[str, typer.Option(help="Where trials begin; a best on the edge widens them.")] = "0.5,1,2,4",
    seeds: Annotated[str | None, typer.Option(help="Of fits and noise; left out, the run's.")] = None,
    n: Annotated[int, typer.Option("-n", min=2, help="Samples for each row, over all (c, y).")] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rows that are there.")] = False,
    trust: Trust = False,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,  # as of exact; --help stays a screen
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Hold a control against what else could be done with the same labels."""
    from .jobs.compare import compare_job, in_words
    from .jobs.testbed import bias_job

    if str(run) == "exact":
        out = out or Path("runs/compare-exact")
        if methods or labels or seeds or resume:
            raise ValueError("compare exact: the testbed has its own methods and labels. Leave the other options out.")
        with job_options(quiet, trust, overwrite, quick) as options:
            rows = bias_job(out, options=options)
        if not quiet:
            typer.echo(f"{len(rows)} rows\nreport: {out / 'report.html'}")
        return
    if quick:
        raise ValueError("--quick is of ctrl compare exact. Here ask for less: --methods, --labels, --strengths, -n.")
    choices = {
        "labels": numbers("labels", labels, int), "strengths": numbers("strengths", strengths, float),
        "seeds": numbers("seeds", seeds, int), "methods": methods.split(",") if methods else [],
    }  # fmt: skip
    with job_options(quiet, trust, overwrite) as options:
        result = compare_job(run, out, **choices, n=n, resume=resume, options=options)
    if not quiet:
        typer.echo(f"{in_words(result)}\nreport: {(out or run / 'compare') / 'report.html'}")


def numbers(option: str, text: str | None, kind: type) -> list:
    """Read the numbers of a list with commas; refuse an entry that is no number, or negative."""
    try:
        values = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        values = [-1]
    if any(value < 0 or not math.isfinite(value) for value in values):
        raise ValueError(f"--{option} {text}: give numbers with commas between them, such as 50,100.")
    return values
