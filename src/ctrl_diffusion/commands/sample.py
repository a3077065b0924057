"""Define `ctrl sample`."""

from pathlib import Path
from typing import Annotated

import typer

from .line.options import OTHER, HiddenTrust, Overwrite, Quiet, Seed, job_options


def sample(
    run: Annotated[Path, typer.Argument(help="A run folder, or ink, the one that ships.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    set_: Annotated[list[str], typer.Option("--set", help="CONTROL=VALUE; left out, the prior's own.")] = [],  # noqa: B006
    class_: Annotated[
        str | None, typer.Option("--class", help="The prior's class, or any prompt; left out, each.")
    ] = None,
    word: Annotated[str, typer.Option(help="A picture for each of its letters, and word.png.")] = "",
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 16,
    strength: Annotated[float, typer.Option(help="w: 0 is the prior, 1 as trained.")] = 1.0,
    gamma: Annotated[float | None, typer.Option(help="γ, of a run with gammas; left out, the run's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; left out, as trained.")] = None,
    seed: Seed = 0,
    exact: Annotated[bool, typer.Option("--exact", help="Draw many paths, keep some by weight: slow, exact.")] = False,
    trust: HiddenTrust = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Draw samples with labels, a strength, a γ, a number of steps and a seed."""
    from ..run.run import Run
    from .jobs.sample import sample_job

    with job_options(quiet, trust, overwrite) as options:
        opened = Run.load(run, trust=trust)
        n = sample_job(opened, out, set_, class_, n, strength, steps, seed, exact, options, gamma, word)
    if not quiet:
        typer.echo(f"{n} samples in {out}")
