"""Define `ctrl train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .line import options as opt


def train(
    out: Annotated[Path | None, typer.Option(help="The run folder; --overwrite replaces a run.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run to go on with; a finished one with --time.")] = None,
    prior: Annotated[str | None, typer.Option(help="Folder, hub id, digits, letters; text: --prompts.")] = None,
    data: opt.Datasets = [],  # noqa: B006
    control: opt.Controls = [],  # noqa: B006
    condition: opt.Conditions = [],  # noqa: B006
    classifier: opt.Classifiers = [],  # noqa: B006
    gamma: Annotated[float | None, typer.Option(help="γ; 1 asks for the posterior itself.")] = None,
    kl: Annotated[float | None, typer.Option(help="Most nats from the prior; γ is lowered to it.")] = None,
    learner: opt.Learner = None,
    time: opt.Time = None,
    config: opt.Settings = None,
    override: opt.Override = [],  # noqa: B006
    seed: opt.ConfigSeed = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")] = False,
    # hidden, so that --help fits a screen: what an error names when it is needed, and what -o can say
    track: opt.Track = None,
    steps: Annotated[int | None, typer.Option(hidden=True)] = None,
    updates: opt.Updates = None,
    prompts: Annotated[str | None, typer.Option(hidden=True)] = None,
    hold_out: Annotated[int | None, typer.Option(min=0, hidden=True)] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", hidden=True)] = False,
    image: opt.Image = None,
    missing: opt.Missing = None,
    trust: Annotated[bool, typer.Option("--trust", hidden=True)] = False,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", hidden=True)] = False,
    quiet: opt.Quiet = opt.OTHER,
) -> None:
    """Add controls to a prior from labelled images, and certify them."""
    from .line.places import check_places, check_resumable

    options: dict[str, Any] = {
        "prior": prior, "prompts": prompts, "hold_out": hold_out, "gamma": gamma, "kl_budget": kl,
        "steps": steps, "seed": seed,
        "learners": learner and learner.split(","), "track": track and track.split(","),
        **opt.control_values(data, control, condition, classifier, skip_bad, image, missing),
    }  # fmt: skip
    if resume:
        others = (out, config, override, overwrite, quick, dry_run)
        if any(others) or any(value is not None for value in options.values()):
            raise ValueError(f"--resume takes everything but --time from {resume}. Leave the other options out.")
        check_resumable(resume)
        resume_training(resume, quiet, trust, time, updates)
        return
    options |= {"time": time, "updates": updates}
    if out is None and not dry_run:
        raise ValueError("--out is missing. Name the run folder, or a run to go on with by --resume.")
    check_places(options, out, bool(config or override))
    values = opt.read_values(options, config, override, trust)
    if dry_run:
        from .jobs.estimate import estimate_job, in_words

        with opt.job_options(quiet, trust, quick=quick) as job:
            estimate = estimate_job(values, job)
        typer.echo(in_words(estimate))
    else:
        from .jobs.train import train_with

        opt.run_training(train_with, values, out, quiet, trust=trust, overwrite=overwrite, quick=quick)


def resume_training(run: Path, quiet: bool, trust: bool, time: str | None, updates: int | None) -> None:
    """Go on with an interrupted run, or a finished one for a time, and print its summary; or say it is finished."""
    from ..run.folder import RunFolder
    from .jobs.train import extend_job, resume_job

    finished = RunFolder(run).is_finished and not (time or updates)
    with opt.job_options(quiet, trust) as options:
        if time or updates:
            metrics = extend_job(run, time, updates, options)
        else:
            metrics = resume_job(run, options.command, options.phase, options.trust)
    if finished and not opt.OTHER:
        typer.echo(f"{run} is finished: there is nothing to go on with, unless you give it --time.")
    else:
        opt.close_training(metrics, run, quiet)
