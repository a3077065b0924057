"""Define `ctrl certify`."""

from pathlib import Path
from typing import Annotated

import typer

from .line.options import OTHER, Overwrite, Quiet, Seed, Trust, job_options


def certify(
    pipeline: Annotated[
        str, typer.Argument(help="The base: a pipeline of diffusers, folder or hub id; or digits, letters.")
    ],
    lora: Annotated[Path, typer.Option(help="The LoRA: a .safetensors file with PEFT's or kohya's names.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    strength: Annotated[float, typer.Option(help="Of the LoRA: scales its weights.")] = 1.0,
    prompt: Annotated[list[str], typer.Option(help="A prompt of a base that is given text; repeat it.")] = [],  # noqa: B006
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts, one a line.")] = None,
    class_: Annotated[list[str], typer.Option("--class", help="A class of the base; left out, all.")] = [],  # noqa: B006
    classifier: Annotated[Path | None, typer.Option(help="A folder of ctrl classifier: hold it against p̂.")] = None,
    value: Annotated[str | None, typer.Option(help="The y it is held against, of --classifier or --run.")] = None,
    rule: Annotated[str | None, typer.Option(help="MODULE:FUNCTION that rates an image by a number.")] = None,
    gamma: Annotated[float | None, typer.Option(help="γ, the reward's weight; left out, the run's, or 1.")] = None,
    run: Annotated[Path | None, typer.Option(help="A run of ctrl train to set beside it at the same KL.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the chain; left out, as ctrl train.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of prompts, 1 for none; left out, the base's.")] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(metavar="HEIGHT WIDTH", help="Of the images, if it makes any size.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=2, help="Paths, and samples of the base, over all c.")] = 1000,
    seed: Seed = 0,
    trust: Trust = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Measure how far any LoRA goes from its base in nats, and how near to the exact conditional."""
    from .jobs.certify import Request, certify_job, in_words

    request = Request(
        pipeline, lora, strength, prompt, prompts, class_, steps, guidance, size, classifier, value, rule, gamma, run,
        n, seed,
    )  # fmt: skip
    with job_options(quiet, trust, overwrite) as options:
        figures = certify_job(request, out, options)
    if not quiet:
        typer.echo(f"{in_words(figures)}\nreport: {out / 'report.html'}")
