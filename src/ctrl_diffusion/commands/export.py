"""Define `ctrl export`."""

from pathlib import Path
from typing import Annotated

import typer

from .line.options import OTHER, Overwrite, Quiet, Trust, job_options


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write: a pipeline of diffusers.")],
    programs: Annotated[
        list[str], typer.Option("--for", help="LoRA files for diffusers, comfyui, a1111, invokeai or all.")
    ] = [],  # noqa: B006
    push: Annotated[str | None, typer.Option(help="OWNER/NAME on the hub to upload it to.")] = None,
    trust: Trust = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Write a pipeline that diffusers loads where nothing of ours is installed."""
    from .jobs.export import export as write_pipeline
    from .jobs.export import push_to_hub

    with job_options(quiet, trust, overwrite) as options:
        write_pipeline(run, out, options, programs)
    if push:
        push_to_hub(out, push)
    if not quiet:
        typer.echo(f'DiffusionPipeline.from_pretrained("{push or out}", trust_remote_code=True)')
