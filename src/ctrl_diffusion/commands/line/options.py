"""Share between commands their options, progress bars, settings and closing words."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ...system.launch import rank_of
from ...system.progress import JobOptions, ignore

SHOWN = 12  # progress bars
RANK = rank_of(os.environ)  # among several processes
OTHER = RANK != "0"  # a process that prints nothing but errors
CTRL = f"ctrl (process {RANK})" if OTHER else "ctrl"

MOST = 2**32 - 1
Seed = Annotated[int, typer.Option(min=0, max=MOST, help="One seed, the same bytes.")]
ConfigSeed = Annotated[int | None, typer.Option("--seed", min=0, max=MOST, help="One seed, the same bytes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no closing words.")]
Control = Annotated[str, typer.Option(help="The new control y: NAME, NAME:COLUMN[=TAG] or NAME:MODULE:FUNCTION.")]
Controls = Annotated[list[str], typer.Option(help="y: NAME or NAME:COLUMN[=TAG]; for each --data.")]
Datasets = Annotated[list[str], typer.Option(help="Folder of labelled images, table, or hub id.")]
Conditions = Annotated[list[str], typer.Option(help="c, as NAME or NAME:COLUMN; - for none.")]
Classifiers = Annotated[list[Path], typer.Option(help="A folder of ctrl classifier; left out, fit one.")]
Settings = Annotated[Path | None, typer.Option(help="Settings (a config.yaml); options above win.")]
Override = Annotated[
    list[str], typer.Option("-o", "--override", metavar="KEY=VALUE", help="Over --config: -o adjoint.clip=5.")
]
Condition = Annotated[str | None, typer.Option(help="The prior's class c: NAME or NAME:COLUMN.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out bad rows, and count them.")]
Image = Annotated[str | None, typer.Option("--image", hidden=True)]  # an error names it when it is needed
Missing = Annotated[str | None, typer.Option("--missing", hidden=True)]  # likewise
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what ctrl wrote there before.")]
Quick = Annotated[bool, typer.Option("--quick", help="A twentieth of the training: a smoke test.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run code that files name: module:function.")]
HiddenTrust = Annotated[bool, typer.Option("--trust", hidden=True)]  # where --help would outgrow a screen
Track = Annotated[str | None, typer.Option(hidden=True)]  # or -o
Time = Annotated[str | None, typer.Option(help="Of training (90s, 30m, 1h), turned into updates.")]
Updates = Annotated[int | None, typer.Option(min=1, hidden=True)]  # of all learners together; or -o
Learner = Annotated[str | None, typer.Option(help="In turn, such as contrast,adjoint or ppo.")]


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
            bars.update(old.id, visible=False)  # a display taller than the terminal would lose its last lines
        bars.start()  # with the first phase, so that a mistake found before it is one line and nothing else
        task = bars.add_task(what, total=total, note="")
        return lambda n=1, note="": bars.update(task, advance=n, note=note)

    try:
        yield JobOptions(phase, trust, overwrite, quick, shlex.join(["ctrl", *sys.argv[1:]]), ignore if quiet else say)
    finally:
        if bars.tasks and not quiet:  # older versions of rich end hidden bars with an empty line
            bars.stop()


def say(line: str) -> None:
    """Print a line on what was understood."""
    typer.echo(f"{CTRL}: {line}", err=True)


def control_values(
    data: list[str], control: list[str], condition: list[str], classifier: list[Path], skip_bad: bool,
    image: str | None, missing: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the settings of the controls: of a single one beside the other keys, of several as a list.

    Those on how to read the data are for all of them.
    """
    n = len(control)
    for name, texts in (("data", data), ("classifier", classifier), ("condition", condition)):
        if len(texts) > max(1, n) or (n > 1 and len(texts) not in (0, n)):
            raise ValueError(f"--{name} is given {len(texts)} times, --control {n} times. Give one for each, in turn.")
    columns = {"control" if n < 2 else "name": control, "data": data, "condition": condition}
    columns["classifier_from"] = [str(folder) for folder in classifier]
    columns = {key: texts for key, texts in columns.items() if texts}
    shared = {"skip_bad": skip_bad or None, "image": image, "missing": missing}
    shared = {key: value for key, value in shared.items() if value is not None}
    rows = [shared | {key: t[i] for key, t in columns.items() if t[i] != "-"} for i in range(max(1, n))]
    return rows[0] if n < 2 else {"controls": rows}


def read_values(
    options: dict[str, Any], config: Path | None, override: list[str], trust: bool, complete: Callable = dict
) -> dict[str, Any]:
    """Return the settings of a file, completed, those of -o over them, and over both the options that are not None."""
    from ...run.config import check_code, read_settings, with_overrides

    options = {key: value for key, value in options.items() if value is not None}
    values = with_overrides(complete(read_settings(config) if config else {}), override, options)
    check_code(values, options, trust, config, override)
    return values


def run_training(job: Callable[..., dict], values: dict[str, Any], out: Path, quiet: bool, **flags: bool) -> None:
    """Run a job that trains, and close as `close_training` does; `flags` are those of `job_options`."""
    with job_options(quiet, **flags) as options:
        metrics = job(values, out, options)
    close_training(metrics, out, quiet)


def close_training(metrics: dict[str, Any], out: Path, quiet: bool) -> None:
    """Print the summary of a training, and whether it failed to learn, also if `quiet`; then exit with 3."""
    from ...evaluate.verdict import Verdict

    verdict = Verdict.from_metrics(metrics)
    if not quiet:
        typer.echo(summary(metrics, ", ".join(metrics["labels"]), out))
    for line in () if OTHER or (quiet and verdict.learned) else verdict.lines(metrics, str(out)):
        typer.echo(f"{CTRL}: {line}", err=True)
    if verdict.exit_code:
        raise typer.Exit(verdict.exit_code)


def summary(metrics: dict[str, Any], control: str, out: Path) -> str:
    """Return the closing words of a training."""
    from ...evaluate.verdict import gap_line, percent

    ctrl = metrics["ctrl"]
    single = "".join(
        f"{name} alone: {percent(part['alone']['accuracy'])} (a perfect learner {percent(part['alone']['target'])})\n"
        for name, part in metrics.get("controls", {}).items()
        if isinstance(part, dict)
    )
    reader = "" if ctrl["class_accuracy"] is None else f"; class still read: {ctrl['class_accuracy']:.1%}"
    unseen = ""
    if apart := metrics.get("held_out"):
        counts, (held, most) = metrics["conditions"], (percent(apart[name]["accuracy"]) for name in ("ctrl", "target"))
        unseen = f"on {counts['held_out']} conditions it never saw: {held} (a perfect learner {most}), gap "
        unseen += f"{gap_line(apart['certificate'])}\n"
    got, prior, target = (percent(metrics[name]["accuracy"]) for name in ("ctrl", "prior", "target"))
    return (
        f"{control} as asked, by the {metrics['accuracy_by']}: {got} "
        f"(prior {prior}, a perfect learner {target}){reader}\n{single}"
        f"gap to the exact conditional: {gap_line(metrics['certificate'])}\n{unseen}"
        f"report: {out / 'report.html'}"
    )
