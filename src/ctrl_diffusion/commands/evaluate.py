"""Define `ctrl evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .line.options import MOST, OTHER, Quiet, Trust, job_options


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Paths of the policy, over all (c, y).")] = 1000,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MOST, help="Of all noise; left out, not the run's own.")
    ] = None,
    prior_samples: Annotated[int | None, typer.Option(min=8, help="Of each c; left out, the run's.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="On the prompts of a file; left out, its own.")] = None,
    program: Annotated[str | None, typer.Option("--as", help="As diffusers, comfyui, a1111 or invokeai do.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Of --as: euler_a or ddpm; left out, euler_a.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Of --as; left out, the run's.")] = None,
    strength: Annotated[float | None, typer.Option(help="Of --as, of the weights; left out, 1.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here; left out, print them.")] = None,
    trust: Trust = False,
    quiet: Quiet = OTHER,
) -> None:
    """Measure a run again: accuracy, adherence, diversity and the certificate."""
    from ..prior.text.prompt_file import read_prompt_file
    from ..run.measure import evaluate as evaluate_run
    from ..run.measure import on_prompts, remeasured
    from ..run.programs.evaluate import ProgramChain, evaluate_as
    from ..run.run import Run
    from ..system.files import rounded, write_json
    from ..system.folders import check_file

    if out is not None:
        check_file(out)
    of_chain = {"sampler": sampler, "steps": steps, "strength": strength}
    of_chain = {name: value for name, value in of_chain.items() if value is not None}
    if of_chain and program is None:
        raise ValueError(f"--{next(iter(of_chain))} is of another program's chain. Name the program with --as.")
    with job_options(quiet, trust) as options:
        opened = remeasured(Run.load(run, trust=trust), seed, prior_samples)
        chain = program and ProgramChain(program, **{"steps": opened.config.steps, **of_chain})
        opened = chain.of(opened) if chain else opened
        if prompts:
            file = read_prompt_file(prompts)
            for note in (file.about, on_prompts(opened, file.prompts)):
                options.say(note)
        used = {"seed": opened.config.seed, "prior_samples": opened.config.evaluation.prior_samples}
        if chain:
            figures = evaluate_as(opened, chain, n, options.phase)
        else:
            figures = evaluate_run(opened, n, options.phase).metrics()
        metrics = {"accuracy_by": opened.accuracy_by, **used, **figures}
    if OTHER:
        return
    if out is None:
        typer.echo(json.dumps(rounded(metrics), indent=2, allow_nan=False))
    else:
        write_json(out, metrics)
