"""Define `ctrl play`."""

from pathlib import Path
from typing import Annotated

import typer

from .line.options import Trust


def play(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; left out, the digits that ship.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page, on this machine; 0 for any.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Also a public address, through gradio's servers.")] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser, only say the address.")] = False,
    trust: Trust = False,
) -> None:
    """Turn a control by hand on a local page in the browser."""
    from ..report.play.server import serve

    serve(runs or [], port, share, not no_browser, trust, lambda line: typer.echo(f"ctrl: {line}"))
