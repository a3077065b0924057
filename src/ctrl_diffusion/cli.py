"""The command line: arguments in, Python API, one clear line when something is wrong."""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Add new conditional controls to pre-trained diffusion and flow models.",
)

Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no closing words.")]


def quiet_dependencies() -> None:
    """Keep the dependencies' banners and advice off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("diffusers", "transformers", "accelerate", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)
    warnings.showwarning = show_warning


@contextmanager
def phases(quiet: bool) -> Iterator:
    """One progress bar per phase of a job."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<27}"), BarColumn(12), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:

        def phase(what: str, total: int):  # noqa: ANN202
            task = bars.add_task(what, total=total, note="")
            return lambda n=1, note="": bars.update(task, advance=n, note=note)

        yield phase


def show_warning(message: Warning | str, category: type, filename: str, *_: object) -> None:
    """A warning of ours is one line; a dependency's is none of the user's business."""
    if Path(__file__).parent in Path(filename).parents:
        typer.echo(f"ctrl: warning: {message}", err=True)


def show_version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        typer.echo(version("ctrl-diffusion"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Add new conditional controls to pre-trained diffusion and flow models."""


@app.command(epilog="Example: ctrl demo --out runs/demo --seed 0")
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    seed: Seed = 0,
    learner: Annotated[str, typer.Option(help="Learners, one after the other.")] = "weighted,adjoint",
    quick: Annotated[
        bool, typer.Option("--quick", help="A twentieth of the training: a smoke test, not a result.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Teach the embedded digits model a control it did not have (ink), and certify it."""
    from .run import Config, run_demo

    config = Config.of({"seed": seed, "learners": learner.split(",")})
    with phases(quiet) as phase:
        metrics = run_demo(config.quick() if quick else config, out, phase)
    if not quiet:
        ctrl, target, gap = metrics["ctrl"], metrics["target"], metrics["certificate"]
        typer.echo(
            f"ink as asked: {ctrl['accuracy']:.1%} (prior {metrics['prior']['accuracy']:.1%}, "
            f"a perfect learner {target['accuracy']:.1%}); digit still read: {ctrl['class_accuracy']:.1%}\n"
            f"gap to the exact conditional: at most {gap['gap_nats']:.2f} ± {gap['gap_stderr']:.2f} nats\n"
            f"report: {out / 'report.html'}"
        )


@app.command(epilog="Example: ctrl sample runs/demo --set ink=3 --class 7 -n 16 --out sevens")
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the images (new or empty).")],
    set_: Annotated[list[str], typer.Option("--set", help="CONTROL=VALUE; left out, the prior's own.")] = [],  # noqa: B006
    class_: Annotated[int | None, typer.Option("--class", help="The prior's class; left out, each in turn.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 16,
    strength: Annotated[float, typer.Option(help="0 the prior, 1 as trained, more extrapolates.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; left out, the training chain's.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Draw samples with labels, a strength, a number of steps and a seed."""
    from .run import Run, sample_to

    with phases(quiet) as phase:
        sample_to(Run.load(run), out, set_, class_, n, strength, steps, seed, phase)
    if not quiet:
        typer.echo(f"{n} samples in {out}")


@app.command(epilog="Example: ctrl evaluate runs/demo -n 2000 --out figures.json")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Paths of the policy, over all (c, y).")] = 1000,
    out: Annotated[Path | None, typer.Option(help="Write the figures here; left out, print them.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure a run again: accuracy, adherence, diversity and the certificate."""
    from .files import rounded, write_json
    from .run import Run
    from .run import evaluate as measure

    with phases(quiet) as phase:
        metrics = measure(Run.load(run), n, phase).metrics()
    if out is None:
        typer.echo(json.dumps(rounded(metrics), indent=2, allow_nan=False))
    else:
        write_json(out, metrics)


def main() -> None:
    """Entry point: a mistake in what was given is one line and exit code 2."""
    quiet_dependencies()
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"ctrl: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
