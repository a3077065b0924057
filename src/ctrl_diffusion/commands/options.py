"""What commands share: their options, progress bars, settings and closing words."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..system.progress import JobOptions

SHOWN = 12  # progress bars
RANK = os.environ.get("RANK", "0")  # among several processes
OTHER = RANK != "0"  # not the one that talks, unless something is wrong
CTRL = f"ctrl (process {RANK})" if OTHER else "ctrl"
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no closing words.")]


@contextmanager
def job_options(quiet: bool, trust: bool = False, overwrite: bool = False, quick: bool = False) -> Iterator[JobOptions]:
    """Give a job its options: what the user typed, and one progress bar for each phase while the job runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        yield JobOptions(phase, trust, overwrite, quick, typed())
    finally:
        if bars.tasks:
            bars.stop()


Control = Annotated[str, typer.Option(help="The new control y: NAME, NAME:COLUMN[=TAG] or NAME:MODULE:FUNCTION.")]
Controls = Annotated[list[str], typer.Option(help="y: NAME or NAME:COLUMN[=TAG]; for each --data.")]
Datasets = Annotated[list[str], typer.Option(help="Folder with metadata.csv, table, or hub id.")]
Conditions = Annotated[list[str], typer.Option(help="c, as NAME or NAME:COLUMN; - for none.")]
Classifiers = Annotated[list[Path], typer.Option(help="A folder of ctrl classifier; left out, fit one.")]
Settings = Annotated[Path | None, typer.Option(help="Settings (a config.yaml); options above win.")]
Condition = Annotated[str | None, typer.Option(help="The prior's class c: NAME or NAME:COLUMN.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out bad rows, and count them.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what ctrl wrote there before.")]
Quick = Annotated[bool, typer.Option("--quick", help="A twentieth of the training: a smoke test.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run code that files name: module:function.")]
Track = Annotated[str | None, typer.Option(help="tensorboard, wandb, …: who is told the figures.")]
Learner = Annotated[str | None, typer.Option(help="weighted, adjoint, backprop, ppo, in turn.")]


def summary(metrics: dict, control: str, out: Path) -> str:
    """The closing words of a training."""
    ctrl, target, gap = metrics["ctrl"], metrics["target"], metrics["certificate"]
    single = "".join(
        f"{name} alone: {found['alone']['accuracy']:.1%} (a perfect learner {found['alone']['target']:.1%})\n"
        for name, found in metrics.get("controls", {}).items()
        if isinstance(found, dict)
    )
    reader = "" if ctrl["class_accuracy"] is None else f"; class still read: {ctrl['class_accuracy']:.1%}"
    return (
        f"{control} as asked, by the {metrics['accuracy_by']}: {ctrl['accuracy']:.1%} "
        f"(prior {metrics['prior']['accuracy']:.1%}, a perfect learner {target['accuracy']:.1%}){reader}\n{single}"
        f"gap to the exact conditional: at most {gap['gap_nats']:.2f} ± {gap['gap_stderr']:.2f} nats\n"
        f"report: {out / 'report.html'}"
    )


def typed() -> str:
    """The command as the user typed it."""
    return shlex.join(["ctrl", *sys.argv[1:]])


def asked(
    data: list[str], control: list[str], condition: list[str], classifier: list[Path], skip_bad: bool
) -> dict[str, str | list[dict[str, str]]]:
    """The settings of the controls that were asked for: of one beside the others, of several in a list."""
    n = len(control)
    for name, given in (("data", data), ("classifier", classifier), ("condition", condition)):
        if len(given) > max(1, n) or (n > 1 and len(given) not in (0, n)):
            raise ValueError(f"--{name} is given {len(given)} times, --control {n} times. Give one for each, in turn.")
    keys = {
        "control" if n < 2 else "name": control,
        "data": data,
        "condition": condition,
        "classifier_from": classifier,
    }
    skip = {"skip_bad": True} if skip_bad else {}
    rows = [
        skip | {key: str(values[i]) for key, values in keys.items() if values and str(values[i]) != "-"}
        for i in range(max(1, n))
    ]
    return rows[0] if n < 2 else {"controls": rows}


def whole(given: dict, config: Path | None, trust: bool) -> dict[str, Any]:
    """The settings of a file and those given over them."""
    from ..run.config import check_code, read_settings

    given = {k: v for k, v in given.items() if v is not None}
    settings = {**(read_settings(config) if config else {}), **given}
    check_code(settings, given, trust, config)
    return settings


def learn(
    job: Callable[..., dict], given: dict, config: Path | None, out: Path, quiet: bool, trust: bool, overwrite: bool,
    quick: bool,
) -> None:  # fmt: skip
    """Run a training on the settings of a file and those given over them, and say what came of it."""
    settings = whole(given, config, trust)
    with job_options(quiet, trust, overwrite, quick) as options:
        metrics = job(settings, out, options)
    if not quiet:
        typer.echo(summary(metrics, ", ".join(metrics["labels"]), out))
