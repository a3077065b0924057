"""The command line: arguments in, Python API, one clear line when something is wrong."""

import json
import logging
import os
import shlex
import sys
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

SHOWN = 12  # progress bars
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no closing words.")]


def quiet_dependencies() -> None:
    """Keep the dependencies' banners and advice off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
    bars = Progress(*columns, console=Console(stderr=True), disable=quiet)

    def phase(what: str, total: int):  # noqa: ANN202
        for old in bars.tasks[-SHOWN::-1]:
            bars.update(old.id, visible=False)  # the display cuts off what a terminal has no room for, at the bottom
        bars.start()  # with the first phase, so that a mistake found before it is one line and nothing else
        task = bars.add_task(what, total=total, note="")
        return lambda n=1, note="": bars.update(task, advance=n, note=note)

    try:
        yield phase
    finally:
        if bars.tasks:
            bars.stop()


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


Control = Annotated[str, typer.Option(help="The column of y, the new control.")]
Condition = Annotated[str | None, typer.Option(help="The column of c, the prior's class, if there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what ctrl wrote there before.")]
Quick = Annotated[bool, typer.Option("--quick", help="A twentieth of the training: a smoke test.")]
Learner = Annotated[str | None, typer.Option(help="weighted, adjoint, backprop, ppo: one after the other.")]


def summary(metrics: dict, control: str, out: Path) -> str:
    """The closing words of a training."""
    ctrl, target, gap = metrics["ctrl"], metrics["target"], metrics["certificate"]
    reader = "" if ctrl["class_accuracy"] is None else f"; class still read: {ctrl['class_accuracy']:.1%}"
    return (
        f"{control} as asked, by the {metrics['accuracy_by']}: {ctrl['accuracy']:.1%} "
        f"(prior {metrics['prior']['accuracy']:.1%}, a perfect learner {target['accuracy']:.1%}){reader}\n"
        f"gap to the exact conditional: at most {gap['gap_nats']:.2f} ± {gap['gap_stderr']:.2f} nats\n"
        f"report: {out / 'report.html'}"
    )


def typed() -> str:
    """The command as the user typed it."""
    return shlex.join(["ctrl", *sys.argv[1:]])


@app.command(epilog="Example: ctrl demo --out runs/demo --seed 0")
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    controls: Annotated[str, typer.Option(help="ink, or digit on the same model without its classes.")] = "ink",
    learner: Learner = None,
    seed: Seed = 0,
    quick: Quick = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Teach the embedded digits model a control it did not have, and certify it."""
    from .job import demo_job

    given = {"seed": seed} | ({"learners": learner.split(",")} if learner else {})
    with phases(quiet) as phase:
        metrics = demo_job(given, out, overwrite, quick, typed(), phase, controls)
    if not quiet:
        typer.echo(summary(metrics, controls, out))


@app.command(
    epilog="Example: ctrl classifier photos --control texture --prior my-pipeline --out runs/texture-classifier"
)
def classifier(
    data: Annotated[Path, typer.Argument(help="An imagefolder: images and metadata.csv or .jsonl.")],
    control: Control,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    condition: Condition = None,
    prior: Annotated[str | None, typer.Option(help="A pipeline folder: read the images at its size.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings (a config.yaml), of which classifier: is read.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fit and calibrate p(y | x) on labelled images, and report how good it is."""
    from .config import Config, read_settings
    from .job import classifier_job

    given = {"prior": "", "data": "", "control": control}
    if config and (own := read_settings(config).get("classifier")):
        given["classifier"] = own
    settings = Config.of(given, str(config)).classifier
    with phases(quiet) as phase:
        found = classifier_job(data, control, condition, out, prior, seed, overwrite, phase, settings).quality
    if not quiet:
        typer.echo(
            f"{control} on held-out images: accuracy {found.accuracy:.1%}, NLL {found.nll:.3f} nats "
            f"(chance {found.chance_nll:.3f}), ECE {found.ece:.3f}\nreport: {out / 'report.html'}"
        )


@app.command(epilog="Example: ctrl train --prior my-pipeline --data photos --control texture --out runs/texture")
def train(
    out: Annotated[Path, typer.Option(help="The run folder.")],
    prior: Annotated[str | None, typer.Option(help="A pipeline folder of diffusers, or digits.")] = None,
    data: Annotated[Path | None, typer.Option(help="An imagefolder: images and metadata.csv or .jsonl.")] = None,
    control: Annotated[str | None, typer.Option(help="The column of y, the new control.")] = None,
    condition: Condition = None,
    classifier: Annotated[Path | None, typer.Option(help="A folder of ctrl classifier; left out, fit one.")] = None,
    gamma: Annotated[float | None, typer.Option(help="γ; 1 asks for the posterior itself.")] = None,
    kl: Annotated[float | None, typer.Option(help="Most nats from the prior; γ is lowered to it.")] = None,
    learner: Learner = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the chain that is trained and certified.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings (a config.yaml); options above win.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")] = None,
    quick: Quick = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Add a control to a prior from labelled images, and certify it."""
    from .config import read_settings
    from .job import train_job

    given = {
        "prior": prior, "data": data and str(data), "control": control, "condition": condition,
        "classifier_from": classifier and str(classifier), "gamma": gamma, "kl_budget": kl, "steps": steps,
        "seed": seed, "learners": learner and learner.split(","),
    }  # fmt: skip
    settings = {**(read_settings(config) if config else {}), **{k: v for k, v in given.items() if v is not None}}
    with phases(quiet) as phase:
        metrics = train_job(settings, out, overwrite, quick, typed(), phase)
    if not quiet:
        typer.echo(summary(metrics, settings["control"], out))


@app.command(epilog="Example: ctrl sample runs/demo --set ink=3 --class 7 -n 16 --out sevens")
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    set_: Annotated[list[str], typer.Option("--set", help="CONTROL=VALUE; left out, the prior's own.")] = [],  # noqa: B006
    class_: Annotated[str | None, typer.Option("--class", help="The prior's class; left out, each in turn.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 16,
    strength: Annotated[float, typer.Option(help="0 the prior, 1 as trained, more extrapolates.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; left out, as trained.")] = None,
    seed: Seed = 0,
    exact: Annotated[bool, typer.Option("--exact", help="Draw many paths, keep some by weight: slow, exact.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Draw samples with labels, a strength, a number of steps and a seed."""
    from .job import sample_job
    from .run import Run

    with phases(quiet) as phase:
        sample_job(Run.load(run), out, set_, class_, n, strength, steps, seed, exact, overwrite, phase)
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
    from .files import check_file, rounded, write_json
    from .run import Run

    if out is not None:
        check_file(out)
    with phases(quiet) as phase:
        opened = Run.load(run)
        metrics = {"accuracy_by": opened.accuracy_by, **opened.evaluate(n, phase).metrics()}
    if out is None:
        typer.echo(json.dumps(rounded(metrics), indent=2, allow_nan=False))
    else:
        write_json(out, metrics)


@app.command(epilog="Example: ctrl exact --quick --out runs/exact")
def exact(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/exact"),
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, a tenth of the training: a smoke test.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Race the learners on priors whose exact conditional is known, and report how close they come."""
    from .job import exact_job

    with phases(quiet) as phase:
        rows = exact_job(out, quick, seed, overwrite, typed(), phase)
    if not quiet:
        typer.echo(f"{len(rows)} races\nreport: {out / 'report.html'}")


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
