"""Define `ctrl demo`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .line import options as opt

# of either model the first is the default
CONTROLS = "Of digits: ink; digit; ink,slant. Of letters: weight; slant; serif; weight,slant,serif."


def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    prior: Annotated[str, typer.Option(help="The embedded model: digits or letters.")] = "digits",
    controls: Annotated[str | None, typer.Option(help=CONTROLS)] = None,
    learner: opt.Learner = None,
    labels: Annotated[int | None, typer.Option(min=1, help="Labelled images for each control.")] = None,
    time: opt.Time = None,
    updates: opt.Updates = None,
    config: opt.Settings = None,
    override: opt.Override = [],  # noqa: B006
    seed: opt.ConfigSeed = None,
    quick: opt.Quick = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = opt.OTHER,
) -> None:
    """Teach an embedded model a control it did not have, and certify it."""
    from .jobs.demo import demo_job, demo_values, first_controls

    controls = controls or first_controls(prior)
    options = {"seed": seed, "time": time, "updates": updates, "learners": learner and learner.split(",")}
    values = opt.read_values(options, config, override, False, partial(demo_values, controls, prior=prior))
    with opt.job_options(quiet, False, overwrite, quick) as job:
        metrics = demo_job(values, out, job, controls, labels, prior)
    opt.close_training(metrics, out, quiet)
    if not quiet:
        typer.echo(f"turn it by hand, on a page in the browser: ctrl play {out}")
