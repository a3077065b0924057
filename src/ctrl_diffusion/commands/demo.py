"""Define `ctrl demo`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .line import options as opt


def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    controls: Annotated[str, typer.Option(help="ink; digit on the model without its classes; ink,slant.")] = "ink",
    learner: opt.Learner = None,
    labels: Annotated[int | None, typer.Option(min=1, help="Labelled digits for each control.")] = None,
    time: opt.Time = None,
    updates: opt.Updates = None,
    config: opt.Settings = None,
    override: opt.Override = [],  # noqa: B006
    seed: opt.ConfigSeed = None,
    quick: opt.Quick = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = opt.OTHER,
) -> None:
    """Teach the embedded digits model a control it did not have, and certify it."""
    from .jobs.demo import demo_job, demo_values

    options = {"seed": seed, "time": time, "updates": updates, "learners": learner and learner.split(",")}
    values = opt.read_values(options, config, override, False, partial(demo_values, controls))
    with opt.job_options(quiet, False, overwrite, quick) as job:
        metrics = demo_job(values, out, job, controls, labels)
    opt.close_training(metrics, out, quiet)
