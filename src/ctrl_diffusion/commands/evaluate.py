"""Define `ctrl evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import MOST, OTHER, Quiet, Trust, job_options


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Paths of the policy, over all (c, y).")] = 1000,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST, help="Of all noise; left out, not the run's own.")
    ] = None,
    prior_samples: Annotated[int | None, typer.Option(min=8, help="Of each c; left out, the run's.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Other prompts to measure it on, one a line; left out, its own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here; left out, print them.")] = None,
    trust: Trust = False,
    quiet: Quiet = OTHER,
) -> None:
    """Measure a run again: accuracy, adherence, diversity and the certificate."""
    from ..prior.text.prompt_file import read_prompt_file
    from ..run.measure import evaluate as evaluate_run
    from ..run.measure import on_prompts, remeasured
    from ..run.run import Run
    from ..system.files import rounded, write_json
    from ..system.folders import check_file

    if out is not None:
        check_file(out)
    with job_options(quiet, trust) as options:
        opened = remeasured(Run.load(run, trust=trust), seed, prior_samples)
        if prompts:
            file = read_prompt_file(prompts)
            for note in (file.about, on_prompts(opened, file.prompts)):
                options.say(note)
        used = {"seed": opened.config.seed, "prior_samples": opened.config.evaluation.prior_samples}
        metrics = {"accuracy_by": opened.accuracy_by, **used, **evaluate_run(opened, n, options.phase).metrics()}
    if OTHER:
        return
    if out is None:
        typer.echo(json.dumps(rounded(metrics), indent=2, allow_nan=False))
    else:
        write_json(out, metrics)
