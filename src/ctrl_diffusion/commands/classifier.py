"""Define `ctrl classifier`."""

from pathlib import Path
from typing import Annotated

import typer

from .line import options as opt


def classifier(
    data: Annotated[str, typer.Argument(help="A folder of labelled images, a table, or a hub id.")],
    control: opt.Control,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    condition: opt.Condition = None,
    prior: Annotated[str | None, typer.Option(help="A pipeline folder: read the images at its size.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings: those of the control, and size.")] = None,
    override: opt.Override = [],  # noqa: B006
    seed: opt.ConfigSeed = None,
    curve: Annotated[bool, typer.Option("--curve", help="How good by the number of labels; extrapolated.")] = False,
    skip_bad: opt.SkipBad = False,
    image: opt.Image = None,
    missing: opt.Missing = None,
    trust: opt.Trust = False,
    overwrite: opt.Overwrite = False,
    quiet: opt.Quiet = opt.OTHER,
) -> None:
    """Fit and calibrate p(y | x) on labelled images, and report how good it is."""
    from .line.places import check_places

    check_places({"data": data, "prior": prior}, out, bool(config or override))
    from ..run.config import Config
    from .jobs.train import classifier_job

    options = {"control": control, "condition": condition, "data": data, "seed": seed}
    options |= {"skip_bad": skip_bad or None, "image": image, "missing": missing}
    values = opt.read_values(options, config, override, trust) | {"prior": "-", "prompts": None}  # not used
    settings = Config.from_values(values, str(config or "settings"))
    with opt.job_options(quiet, trust, overwrite) as job:
        panel = classifier_job(settings.controls[0], out, prior, settings.seed, job, settings.size, curve)
    report = panel.quality
    if not quiet:
        typer.echo(
            f"{panel.control} on held-out images: accuracy {report.accuracy:.1%}, NLL {report.nll:.3f} nats "
            f"(chance {report.chance_nll:.3f}), ECE {report.ece:.3f}\nreport: {out / 'report.html'}"
        )
