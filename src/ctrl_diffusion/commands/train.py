"""ctrl train."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    OTHER,
    Classifiers,
    Conditions,
    Controls,
    Datasets,
    Learner,
    Quiet,
    Settings,
    Track,
    asked,
    job_options,
    learn,
    summary,
    whole,
)


def train(
    out: Annotated[Path | None, typer.Option(help="The run folder; --overwrite replaces a run.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run to go on with; give nothing else.")] = None,
    prior: Annotated[str | None, typer.Option(help="Pipeline (folder, hub), digits; text: --prompts.")] = None,
    data: Datasets = [],  # noqa: B006
    control: Controls = [],  # noqa: B006
    condition: Conditions = [],  # noqa: B006
    classifier: Classifiers = [],  # noqa: B006
    gamma: Annotated[float | None, typer.Option(help="γ; 1 asks for the posterior itself.")] = None,
    kl: Annotated[float | None, typer.Option(help="Most nats from the prior; γ is lowered to it.")] = None,
    learner: Learner = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the chain that is trained and certified.")] = None,
    config: Settings = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")] = None,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")] = False,
    # what an error names when it is needed is hidden: --help stays a screen
    prompts: Annotated[str | None, typer.Option(hidden=True)] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", hidden=True)] = False,
    trust: Annotated[bool, typer.Option("--trust", hidden=True)] = False,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", hidden=True)] = False,
    quiet: Quiet = OTHER,
) -> None:
    """Add controls to a prior from labelled images, and certify them."""
    from ..run.folder import RunFolder
    from .jobs.train import resume_job, train_with

    given = {
        "prior": prior, "prompts": prompts, "gamma": gamma, "kl_budget": kl, "steps": steps, "seed": seed,
        "learners": learner and learner.split(","), "track": track and track.split(","),
        **asked(data, control, condition, classifier, skip_bad),
    }  # fmt: skip
    if resume:
        if out or config or overwrite or quick or dry_run or any(value is not None for value in given.values()):
            raise ValueError(f"--resume takes everything from {resume}. Leave the other options out.")
        done = RunFolder(resume).is_finished
        with job_options(quiet, trust) as options:
            metrics = resume_job(resume, options.command, options.phase, trust)
        if done and not OTHER:
            typer.echo(f"{resume} is finished: there is nothing to go on with.")
        elif not quiet:
            typer.echo(summary(metrics, ", ".join(metrics["labels"]), resume))
        return
    if dry_run:
        from .jobs.estimate import estimate_job, in_words

        settings = whole(given, config, trust)
        with job_options(quiet, trust, quick=quick) as options:
            found = estimate_job(settings, options)
        typer.echo(in_words(found))
        return
    if out is None:
        raise ValueError("--out is missing. Name the run folder, or a run to go on with by --resume.")
    learn(train_with, given, config, out, quiet, trust, overwrite, quick)
