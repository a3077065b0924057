"""Define `ctrl inspect`."""

import json
from typing import Annotated

import typer


def inspect(
    prior: Annotated[str, typer.Argument(help="A pipeline of diffusers, folder or hub id; or digits, letters.")],
    size: Annotated[
        tuple[int, int] | None, typer.Option(metavar="HEIGHT WIDTH", help="Of the images, if it makes any size.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a pre-trained model is, and what training a control on it would take."""
    from ..prior.prior import open_prior
    from .jobs.inspect import describe, in_words

    model = open_prior(prior, size)
    facts = describe(model.with_prompts([""]) if model.text else model)
    typer.echo(json.dumps(facts, indent=2) if json_ else in_words(facts))
