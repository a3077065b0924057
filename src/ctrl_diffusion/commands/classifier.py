"""ctrl classifier."""

from pathlib import Path
from typing import Annotated

import typer

from .options import OTHER, Condition, Control, Overwrite, Quiet, Seed, SkipBad, Trust, job_options, whole


def classifier(
    data: Annotated[str, typer.Argument(help="A folder with a metadata.csv, a table, or a hub id.")],
    control: Control,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    condition: Condition = None,
    prior: Annotated[str | None, typer.Option(help="A pipeline folder: read the images at its size.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings: those of the control, and size.")] = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    trust: Trust = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Fit and calibrate p(y | x) on labelled images, and report how good it is."""
    from ..run.config import Config
    from .jobs.train import classifier_job

    given = {"control": control, "condition": condition, "data": data, "skip_bad": skip_bad or None}
    values = {**whole(given, config, trust), "prior": "-", "prompts": None}  # of no use here
    settings = Config.from_values(values, str(config or "settings"))
    with job_options(quiet, trust, overwrite) as options:
        panel = classifier_job(settings.controls[0], out, prior, seed, options, settings.size)
    found = panel.quality
    if not quiet:
        typer.echo(
            f"{panel.control} on held-out images: accuracy {found.accuracy:.1%}, NLL {found.nll:.3f} nats "
            f"(chance {found.chance_nll:.3f}), ECE {found.ece:.3f}\nreport: {out / 'report.html'}"
        )
