"""Run the command line: every error of the user's is one clear line."""

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..system.launch import read_launch, set_threads
from ..system.progress import Interrupted
from .add import add
from .certify import certify
from .classifier import classifier
from .compare import compare
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .exact import exact
from .export import export
from .inspect import inspect
from .line.options import CTRL, OTHER
from .line.terminal import spell_output
from .play import play
from .sample import sample
from .train import train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Add new conditional controls to pre-trained diffusion and flow models.",
    epilog="Exit codes: 0 done, 2 an error, 3 trained but nothing learned, 130 interrupted.",
)
SHARED = ("demo", "train", "add", "sample", "evaluate")  # commands that several processes run together


def quiet_dependencies() -> None:
    """Keep the dependencies' banners and advice off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # they set up their loggers on import
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in ("diffusers", "transformers", "accelerate", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it logs of a damaged picture is in its error too
    warnings.showwarning = show_warning


def show_warning(message: Warning | str, category: type, filename: str, *_: object) -> None:
    """Print a warning of ours as one line, and none of a dependency."""
    if Path(__file__).parents[1] in Path(filename).parents and not OTHER:
        typer.echo(f"ctrl: warning: {message}", err=True)


def show_version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Add new conditional controls to pre-trained diffusion and flow models."""
    name, launch = context.invoked_subcommand, read_launch(os.environ)
    if launch.size > 1 and name not in SHARED:
        started = f"{launch.by} started {launch.size}"
        raise ValueError(f"ctrl {name} is the work of one process, and {started}. Start it without {launch.by}.")


# each command with an example, in the order of `ctrl --help`
COMMANDS = {
    demo: "ctrl demo --out runs/demo --seed 0",
    classifier: "ctrl classifier photos --control texture --prior mine --out p-hat",
    train: "ctrl train --prior mine --data photos --control texture --out run",
    add: "ctrl add runs/ink --data photos --control slant --out runs/both",
    inspect: "ctrl inspect my-pipeline",
    doctor: "ctrl doctor --prior my-pipeline --data photos --control texture",
    sample: "ctrl sample runs/demo --set ink=3 --class 7 -n 16 --out sevens",
    play: "ctrl play runs/demo",
    evaluate: "ctrl evaluate runs/demo -n 2000 --out figures.json",
    compare: "ctrl compare runs/demo --labels 50,100,200 --seeds 1,2,3 --out runs/compared",
    export: "ctrl export runs/texture texture-pipeline",
    certify: "ctrl certify my-pipeline --lora style.safetensors --prompts prompts.txt --out runs/style",
    exact: "ctrl exact --quick --out runs/exact",
}
for command, example in COMMANDS.items():
    app.command(epilog=f"Example: {example}")(command)


def main() -> None:
    """Run the entry point; exit with 2 after an error, which is one line, with 130 after an interrupt.

    A training whose control has not learned exits with 3 (`options.close_training`).
    """
    spell_output()
    set_threads()
    quiet_dependencies()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    try:
        app()
    except (ValueError, OSError, FloatingPointError, MemoryError, Interrupted) as error:
        typer.echo(f"{CTRL}: {error}", err=True)
        raise SystemExit(130 if isinstance(error, Interrupted) else 2) from None
    except RuntimeError as error:
        from ..run.stages import out_of_memory

        if not out_of_memory(error):
            raise
        advice = "Turn down micro_batch, a learner's batch, rank or size in a --config."
        typer.echo(f"{CTRL}: out of memory. {advice}", err=True)
        raise SystemExit(2) from None
