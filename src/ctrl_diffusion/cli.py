"""The command line: arguments in, Python API, one clear line when something is wrong."""

import json
import logging
import math
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from .system.progress import Interrupted

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Add new conditional controls to pre-trained diffusion and flow models.",
)

SHOWN = 12  # progress bars
RANK = os.environ.get("RANK", "0")  # among several processes
OTHER = RANK != "0"  # not the one that talks, unless something is wrong
SHARED = ("demo", "train", "add", "sample", "evaluate")  # what several processes do together
CTRL = f"ctrl (process {RANK})" if OTHER else "ctrl"
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar, no closing words.")]


def quiet_dependencies() -> None:
    """Keep the dependencies' banners and advice off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # they set up their loggers on import
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
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
    if Path(__file__).parent in Path(filename).parents and not OTHER:
        typer.echo(f"ctrl: warning: {message}", err=True)


def show_version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        typer.echo(version("ctrl-diffusion"))
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Add new conditional controls to pre-trained diffusion and flow models."""
    name = context.invoked_subcommand
    if os.environ.get("WORLD_SIZE", "1") != "1" and name not in SHARED:
        raise ValueError(f"ctrl {name} is the work of one process: start it without accelerate launch.")


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


@app.command(epilog="Example: ctrl demo --out runs/demo --seed 0")
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    controls: Annotated[str, typer.Option(help="ink; digit on the model without its classes; ink,slant.")] = "ink",
    learner: Learner = None,
    labels: Annotated[int | None, typer.Option(min=1, help="Labelled digits for each control.")] = None,
    config: Settings = None,
    seed: Seed = 0,
    quick: Quick = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Teach the embedded digits model a control it did not have, and certify it."""
    from .job import demo_job
    from .run.config import check_code, read_settings

    given = (read_settings(config) if config else {}) | {"seed": seed}
    check_code(given, {}, False, config)
    given |= {"learners": learner.split(",")} if learner else {}
    with phases(quiet) as phase:
        metrics = demo_job(given, out, overwrite, quick, typed(), phase, controls, labels)
    if not quiet:
        typer.echo(summary(metrics, controls, out))


@app.command(
    epilog="Example: ctrl classifier photos --control texture --prior my-pipeline --out runs/texture-classifier"
)
def classifier(
    data: Annotated[str, typer.Argument(help="A folder with a metadata.csv, a table, or a hub id.")],
    control: Control,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    condition: Condition = None,
    prior: Annotated[str | None, typer.Option(help="A pipeline folder: read the images at its size.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings: those of the control, and size.")] = None,
    seed: Seed = 0,
    skip_bad: SkipBad = False,
    trust: Trust = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Fit and calibrate p(y | x) on labelled images, and report how good it is."""
    from .job import classifier_job
    from .run.config import ControlSettings, listed

    given = {"control": control, "condition": condition, "data": data, "skip_bad": skip_bad or None}
    settings = listed(whole(given, config, trust))
    mine = ControlSettings.of(settings["controls"][0], str(config))
    with phases(quiet) as phase:
        judges = classifier_job(mine, out, prior, seed, overwrite, phase, settings.get("size"))
    found = judges.quality
    if not quiet:
        typer.echo(
            f"{judges.control} on held-out images: accuracy {found.accuracy:.1%}, NLL {found.nll:.3f} nats "
            f"(chance {found.chance_nll:.3f}), ECE {found.ece:.3f}\nreport: {out / 'report.html'}"
        )


@app.command(epilog="Example: ctrl train --prior mine --data photos --control texture --out run")
def train(
    out: Annotated[Path | None, typer.Option(help="The run folder; --overwrite replaces a run.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A run to go on with; give nothing else.")] = None,
    prior: Annotated[str | None, typer.Option(help="Pipeline (folder, hub), digits; text: --prompts.")] = None,
    data: Datasets = [],  # noqa: B006
    control: Controls = [],  # noqa: B006
    condition: Conditions = [],  # noqa: B006
    classifier: Classifiers = [],  # noqa: B006
    gamma: Annotated[float | None, typer.Option(help="γ; 1 asks for the posterior itself.")] = None,
    kl: Annotated[float | None, typer.Option(help="Most nats from the prior; γ is lowered to it.")] = None,
    learner: Learner = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the chain that is trained and certified.")] = None,
    config: Settings = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")] = None,
    track: Track = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")] = False,
    # what an error names when it is needed is hidden: --help stays a screen
    prompts: Annotated[str | None, typer.Option(hidden=True)] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", hidden=True)] = False,
    trust: Annotated[bool, typer.Option("--trust", hidden=True)] = False,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", hidden=True)] = False,
    quiet: Quiet = OTHER,
) -> None:
    """Add controls to a prior from labelled images, and certify them."""
    from .job import resume_job, train_job
    from .run.folder import is_finished

    given = {
        "prior": prior, "prompts": prompts, "gamma": gamma, "kl_budget": kl, "steps": steps, "seed": seed,
        "learners": learner and learner.split(","), "track": track and track.split(","),
        **asked(data, control, condition, classifier, skip_bad),
    }  # fmt: skip
    if resume:
        if out or config or overwrite or quick or dry_run or any(value is not None for value in given.values()):
            raise ValueError(f"--resume takes everything from {resume}. Leave the other options out.")
        done = is_finished(resume)
        with phases(quiet) as phase:
            metrics = resume_job(resume, typed(), phase, trust)
        if done and not OTHER:
            typer.echo(f"{resume} is finished: there is nothing to go on with.")
        elif not quiet:
            typer.echo(summary(metrics, ", ".join(metrics["labels"]), resume))
        return
    if dry_run:
        from .estimate import estimate_job, in_words

        settings = whole(given, config, trust)
        with phases(quiet) as phase:
            found = estimate_job(settings, quick, phase, trust)
        typer.echo(in_words(found))
        return
    if out is None:
        raise ValueError("--out is missing. Name the run folder, or a run to go on with by --resume.")
    learn(train_job, given, config, out, trust, quiet, overwrite=overwrite, quick=quick)


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
    from .run.config import check_code, read_settings

    given = {k: v for k, v in given.items() if v is not None}
    settings = {**(read_settings(config) if config else {}), **given}
    check_code(settings, given, trust, config)
    return settings


def learn(
    job: Callable[..., dict], given: dict, config: Path | None, out: Path, trust: bool, quiet: bool, **options: Any
) -> None:
    """Run a training on the settings of a file and those given over them, and say what came of it."""
    settings = whole(given, config, trust)
    with phases(quiet) as phase:
        metrics = job(settings, out, command=typed(), phase=phase, trust=trust, **options)
    if not quiet:
        typer.echo(summary(metrics, ", ".join(metrics["labels"]), out))


@app.command(epilog="Example: ctrl add runs/ink --data photos --control slant --out runs/both")
def add(
    run: Annotated[Path, typer.Argument(help="A run folder; it is not changed.")],
    out: Annotated[Path, typer.Option(help="The new run folder.")],
    data: Datasets = [],  # noqa: B006
    control: Controls = [],  # noqa: B006
    condition: Conditions = [],  # noqa: B006
    classifier: Classifiers = [],  # noqa: B006
    learner: Learner = None,
    config: Settings = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="One seed, the same bytes.")] = None,
    track: Track = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", hidden=True)] = False,
    trust: Annotated[bool, typer.Option("--trust", hidden=True)] = False,
    quick: Quick = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Add a control to a finished run; its own controls stay as they are, to the bit."""
    from .job import add_job

    controls = asked(data, control, condition, classifier, skip_bad)
    told = {"learners": learner and learner.split(","), "track": track and track.split(",")}
    given = {"seed": seed, **told, **controls}
    learn(partial(add_job, run), given, config, out, trust, quiet, overwrite=overwrite, quick=quick)


@app.command(epilog="Example: ctrl inspect my-pipeline")
def inspect(
    prior: Annotated[str, typer.Argument(help="A pipeline of diffusers, folder or hub id; or digits.")],
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="HEIGHT WIDTH", help="Of the images, if it makes any size."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a pre-trained model is, and what training a control on it would take."""
    from .inspection import in_words, inspected
    from .prior.prior import open_prior

    model = open_prior(prior, size)
    found = inspected(model.with_prompts([""]) if model.text else model)
    typer.echo(json.dumps(found, indent=2) if json_ else in_words(found))


@app.command(epilog="Example: ctrl sample runs/demo --set ink=3 --class 7 -n 16 --out sevens")
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    set_: Annotated[list[str], typer.Option("--set", help="CONTROL=VALUE; left out, the prior's own.")] = [],  # noqa: B006
    class_: Annotated[
        str | None, typer.Option("--class", help="The prior's class, or any prompt; left out, each.")
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 16,
    strength: Annotated[float, typer.Option(help="0 the prior, 1 as trained, more extrapolates.")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; left out, as trained.")] = None,
    seed: Seed = 0,
    exact: Annotated[bool, typer.Option("--exact", help="Draw many paths, keep some by weight: slow, exact.")] = False,
    trust: Trust = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Draw samples with labels, a strength, a number of steps and a seed."""
    from .job import sample_job
    from .run.run import Run

    with phases(quiet) as phase:
        sample_job(Run.load(run, trust=trust), out, set_, class_, n, strength, steps, seed, exact, overwrite, phase)
    if not quiet:
        typer.echo(f"{n} samples in {out}")


@app.command(epilog="Example: ctrl evaluate runs/demo -n 2000 --out figures.json")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    n: Annotated[int, typer.Option("-n", min=2, help="Paths of the policy, over all (c, y).")] = 1000,
    out: Annotated[Path | None, typer.Option(help="Write the figures here; left out, print them.")] = None,
    trust: Trust = False,
    quiet: Quiet = OTHER,
) -> None:
    """Measure a run again: accuracy, adherence, diversity and the certificate."""
    from .run.run import Run
    from .system.files import rounded, write_json
    from .system.folders import check_file

    if out is not None:
        check_file(out)
    with phases(quiet) as phase:
        opened = Run.load(run, trust=trust)
        metrics = {"accuracy_by": opened.accuracy_by, **opened.evaluate(n, phase).metrics()}
    if OTHER:
        return
    if out is None:
        typer.echo(json.dumps(rounded(metrics), indent=2, allow_nan=False))
    else:
        write_json(out, metrics)


@app.command(epilog="Example: ctrl compare runs/demo --labels 50,100,200 --seeds 1,2,3 --out runs/compared")
def compare(
    run: Annotated[Path, typer.Argument(help="A run folder; or exact, the testbed.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; left out, RUN/compare.")] = None,
    methods: Annotated[str | None, typer.Option(help="Of these only, by name; a wrong one lists them.")] = None,
    labels: Annotated[str | None, typer.Option(help="How many of each control; left out, all there are.")] = None,
    strengths: Annotated[str, typer.Option(help="Of what is turned by strength.")] = "0.5,1,2,4",
    seeds: Annotated[str | None, typer.Option(help="Of fits and noise; left out, the run's.")] = None,
    n: Annotated[int, typer.Option("-n", min=2, help="Samples for each row, over all (c, y).")] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rows that are there.")] = False,
    trust: Trust = False,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,  # as of exact; --help stays a screen
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Hold a control against what else could be done with the same labels."""
    from .compare import compare_job, in_words
    from .job import bias_job

    if str(run) == "exact":
        out = out or Path("runs/compare-exact")
        if methods or labels or seeds or resume:
            raise ValueError("compare exact: the testbed has its own methods and labels. Leave the other options out.")
        with phases(quiet) as phase:
            rows = bias_job(out, quick, 0, overwrite, typed(), phase)
        if not quiet:
            typer.echo(f"{len(rows)} rows\nreport: {out / 'report.html'}")
        return
    if quick:
        raise ValueError("--quick is of ctrl compare exact. Here ask for less: --methods, --labels, --strengths, -n.")
    asked = {
        "labels": numbers("labels", labels, int), "strengths": numbers("strengths", strengths, float),
        "seeds": numbers("seeds", seeds, int), "methods": methods.split(",") if methods else [],
    }  # fmt: skip
    with phases(quiet) as phase:
        found = compare_job(
            run, out, **asked, n=n, resume=resume, overwrite=overwrite, command=typed(), phase=phase, trust=trust
        )
    if not quiet:
        typer.echo(f"{in_words(found)}\nreport: {(out or run / 'compare') / 'report.html'}")


def numbers(option: str, text: str | None, kind: type) -> list:
    """The numbers of a list with commas.

    Raises:
        ValueError: something else stands in it, or a negative number.
    """
    try:
        found = [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [-1]
    if any(number < 0 or not math.isfinite(number) for number in found):
        raise ValueError(f"--{option} {text}: give numbers with commas between them, such as 50,100.")
    return found


@app.command(epilog="Example: ctrl export runs/texture texture-pipeline")
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write: a pipeline of diffusers.")],
    push: Annotated[str | None, typer.Option(help="OWNER/NAME on the hub to upload it to.")] = None,
    trust: Trust = False,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Write a pipeline that diffusers loads where nothing of ours is installed."""
    from .export import export, push_to_hub

    export(run, out, overwrite, trust)
    if push:
        push_to_hub(out, push)
    if not quiet:
        typer.echo(f'DiffusionPipeline.from_pretrained("{push or out}", trust_remote_code=True)')


@app.command(epilog="Example: ctrl exact --quick --out runs/exact")
def exact(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/exact"),
    quick: Annotated[bool, typer.Option("--quick", help="Two tasks, a tenth of the training: a smoke test.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = OTHER,
) -> None:
    """Race the learners on priors whose exact conditional is known, and report how close they come."""
    from .job import exact_job

    with phases(quiet) as phase:
        rows = exact_job(out, quick, seed, overwrite, typed(), phase)
    if not quiet:
        typer.echo(f"{len(rows)} races\nreport: {out / 'report.html'}")


def stop(*_: object) -> None:
    """A terminal's Ctrl-C and a system's SIGTERM mean the same."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point: what went wrong is one line, and exit code 2; 130 for a job that was asked to stop."""
    quiet_dependencies()
    signal.signal(signal.SIGTERM, stop)
    try:
        app()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        typer.echo(f"{CTRL}: {error}", err=True)
        raise SystemExit(2) from None
    except Interrupted as error:
        typer.echo(f"{CTRL}: {error}", err=True)
        raise SystemExit(130) from None
    except RuntimeError as error:
        from .run.stages import out_of_memory

        if not out_of_memory(error):
            raise
        typer.echo(
            f"{CTRL}: out of memory. Turn down micro_batch, a learner's batch, rank or size in a --config.", err=True
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
