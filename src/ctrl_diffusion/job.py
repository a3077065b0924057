"""The jobs behind the commands: from labelled images to p̂, and from a prior and p̂ to a certified control."""

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from . import demo
from .data.labelled import LabelledImages, write_imagefolder
from .data.labels import NULL, number_at
from .exact.bias import biases
from .exact.races import Picture, races
from .prior.prior import open_prior
from .report.classifier import write_classifier_report
from .report.run import write_report
from .report.style import save_figure, sheet_figure
from .report.testbed import write_bias_report, write_exact_report
from .reward.classifiers import Judges, fit_judges
from .run.config import Config, ControlSettings, check_code, listed, merged
from .run.folder import (
    BEGUN,
    CHECKPOINT,
    CLASSIFIER_FILES,
    DATA_FOLDERS,
    KEPT,
    RESULTS,
    RUN_FILES,
    check_unchanged,
    fixed,
    home,
    is_finished,
)
from .run.measure import STRENGTHS, Shown, classifier_metrics, follows, step_counts, sweep_metrics
from .run.prepare import Job, Material, check_batches, dependences, encoder_of, keep_classes, material, prepare
from .run.run import Run, as_set
from .run.stages import train_in
from .system import ranks
from .system.files import write_json, write_text, writing
from .system.folders import check_room, check_writable, clear, clear_unfinished, locked
from .system.progress import Interrupted, Phase, silent, timed
from .system.tracking import Tracking, check_trackers

SAMPLE_FILES = ("metadata.csv", "[0-9][0-9][0-9][0-9][0-9].png", "grid.png", "sample.json")
EXACT_FILES = ("exact.json", "report.html", "density.png", "gap.png", "growth.png")
BIAS_FILES = ("bias.json", "report.html", "bias.png")
PACKAGES = ("ctrl-diffusion", "torch", "diffusers", "peft", "accelerate", "scikit-learn")


def classifier_job(
    settings: ControlSettings,
    out: Path,
    prior: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    phase: Phase = silent,
    size: tuple[int, int] | None = None,
) -> Judges:
    """Fit p̂, the judge, and the reader of a condition on labelled images, and report them.

    Args:
        settings: of the control, as of a training; a ruler, or what was fitted before, is left aside.
        out: the folder to write.
        prior: a pipeline folder, at whose size the images are read; None takes them as they are.
        seed: of the parts and the fits.
        overwrite: whether an earlier classifier in `out` may go.
        phase: told of progress.
        size: (height, width) of the prior's images, of one that makes any.

    Raises:
        ValueError: the data or the folder are not as they should be, or p̂ is no better than chance.
    """
    check_room(out, CLASSIFIER_FILES[-1], overwrite)
    if size is not None and not (isinstance(size, (list, tuple)) and [type(side) for side in size] == [int, int]):
        raise ValueError(f"size must be [height, width], got {size!r}.")
    if size and not prior:
        raise ValueError("size is that of a prior's images. Give --prior, or leave size out.")
    settings = settings.model_copy(update=dict.fromkeys(("ruler", "classifier_from", "settled_from")))
    name, condition = settings.name, settings.condition
    model = open_prior(prior, size).placed() if prior else None
    one = material(settings, model, phase)
    keep_classes(one, one.data.labels[condition].unique().tolist() if condition else None)
    judges, held_out = fit_judges(
        one.data, name, condition, settings=settings.classifier, seed=seed, phase=phase, judge_data=one.judge_data,
        encode=encoder_of(model), device=model.denoiser.device if model else "cpu",
    )  # fmt: skip
    clear(out, CLASSIFIER_FILES)
    judges.save(out)
    write_classifier_report(out, judges, held_out)
    return judges


@contextmanager
def occupied(out: Path, overwrite: bool) -> Iterator[None]:
    """Have a folder for a run to oneself, if it is free or may be overwritten; of several ranks rank 0 sees to it.

    Raises:
        ValueError: what is in the way, and what to do.
        Interrupted: before there was something to keep.
    """

    def enter() -> None:
        if (out / CHECKPOINT / BEGUN).is_file() and not overwrite:
            raise ValueError(
                f"{out} is a run that did not finish. Go on with it by ctrl train --resume {out}, or pass --overwrite."
            )
        check_room(out, RUN_FILES[-1], overwrite)
        stack.enter_context(locked(out))

    try:
        with ExitStack() as stack, ranks.first_speaks():
            ranks.from_first(enter)
            yield
    except KeyboardInterrupt:
        command = "the same command" + (" with --overwrite" if (out / RUN_FILES[-1]).is_file() else "")
        raise Interrupted(f"interrupted before training began: {command} begins again.") from None


def train_job(
    given: dict[str, Any],
    out: str | Path,
    overwrite: bool = False,
    quick: bool = False,
    command: str | None = None,
    phase: Phase = silent,
    trust: bool = False,
) -> dict[str, Any]:
    """Train a control, certify it and report it in a run folder.

    Args:
        given: settings by the names of `Config`, of which prior, data and control must be there.
        out: the run folder.
        overwrite: whether an earlier run in `out` may go.
        quick: a twentieth of the training, a smoke test.
        command: what the user typed, for the report.
        phase: told of progress.
        trust: run code that a classifier's folder names.

    Returns:
        The contents of metrics.json.

    Raises:
        ValueError: the settings, data or folder are not as they should be, or p̂ is no better than chance.
        Interrupted, MemoryError, OSError: what happened on the way, and how to go on (`resume_job`).
    """
    out = Path(out)
    with occupied(out, overwrite):
        return execute(prepare(given, phase, trust), out, quick, command, phase)


def demo_job(
    given: dict[str, Any],
    out: str | Path,
    overwrite: bool = False,
    quick: bool = False,
    command: str | None = None,
    phase: Phase = silent,
    controls: str = "ink",
    labels: int | None = None,
) -> dict[str, Any]:
    """`train_job` on the embedded prior with labelled digits, and others for the judge, written into the run folder."""
    out = Path(out)
    if controls not in demo.SETTINGS:
        raise ValueError(f"the demo's controls are {' or '.join(demo.SETTINGS)}; got {controls!r}.")
    settings = merged(deepcopy(demo.SETTINGS[controls]), {k: v for k, v in given.items() if k != "classifier"})
    with occupied(out, overwrite), TemporaryDirectory() as scratch:
        drawn = demo.labelled_digits(controls, given.get("seed", 0), labels)
        for control, pair in zip(settings["controls"], drawn, strict=True):
            control["classifier"] = merged(control["classifier"], given.get("classifier", {}))
            for kind, data in zip(DATA_FOLDERS, pair, strict=True):
                folder = Path(kind, control["name"]) if len(drawn) > 1 else Path(kind)
                write_imagefolder(scratch / folder, data)
                control[kind] = str(scratch / folder)
        job = prepare(settings, phase)
        for control in job.config.controls:
            control.data, control.judge_data = (
                str(out.resolve() / Path(name).relative_to(Path(scratch).resolve()))
                for name in (control.data, control.judge_data)
            )
        return execute(job, out, quick, command, phase, Path(scratch))


def add_job(
    run: str | Path,
    given: dict[str, Any],
    out: str | Path,
    overwrite: bool = False,
    quick: bool = False,
    command: str | None = None,
    phase: Phase = silent,
    trust: bool = False,
) -> dict[str, Any]:
    """Train one more control on a finished run, whose own controls stay as they are; otherwise as `train_job`.

    Args:
        run: the run folder; it is not changed.
        given: settings by the names of `Config`: of the new control and its training. Prior, chain, classes and γ are
            the run's.
        out, overwrite, quick, command, phase, trust: see `train_job`.
    """
    out = Path(out)
    check_room(out, RUN_FILES[-1], overwrite)
    old = Run.load(run, trust=trust).config
    for name in ("data", "control"):
        if not given.get(name) and not given.get("controls"):
            raise ValueError(f"--{name} is missing. Give it, or a --config that has it.")
    here = str(Path(run).resolve())
    settled = [{**control.model_dump(), "settled_from": here} for control in old.controls]
    given = listed(given)
    kept = old.model_dump(include=KEPT)
    whole = {**given, **kept, "controls": [*settled, *given["controls"]]}
    return train_job(whole, out, overwrite, quick, command, phase, trust)


def execute(
    job: Job, folder: Path, quick: bool, command: str | None, phase: Phase, own_data: Path | None = None
) -> dict[str, Any]:
    """Do a prepared training in a run folder; `own_data` holds datasets that become the run's.

    The folder is not touched before every p̂ has shown that it is worth a training. What is needed from then on to go
    on at any moment lies in its checkpoint/, which goes when the run is finished. Rank 0 fits p̂ for all: fits on
    accelerators are alike, but not to the bit, and ranks that decide differently would wait for each other for ever.
    """
    config, device, seconds = job.config.quick() if quick else job.config, job.prior.denoiser.device, {}
    judges: dict[str, Judges] = {}
    held_out: dict[str, LabelledImages] = {}
    with timed(seconds, "classifier"):
        for one in job.materials:
            name = one.settings.name

            def fitted(one: Material = one, name: str = name) -> Judges:
                s = config.settings_of(name)
                found, held_out[name] = fit_judges(
                    one.data, name, s.condition, bool(s.ruler), s.classifier, config.seed, phase, one.judge_data,
                    encoder_of(job.prior), device,
                )  # fmt: skip
                return found.to("cpu")

            judges[name] = one.judges or ranks.from_first(fitted).to(device)
    shared = dependences(job.materials, judges, job.prior)
    if job.prior.codec:
        job.prior.codec.vae.cpu()  # it comes back when there is something to decode
    run = Run.start(config, job.prior, judges)
    if config.kl_budget:
        run.spend(config.kl_budget, phase)

    def lay_out() -> None:
        clear(folder, RUN_FILES if own_data is None else (RUN_FILES[0], *DATA_FOLDERS, *RUN_FILES[1:]))
        (folder / RUN_FILES[-1]).touch()
        if own_data:
            for name in DATA_FOLDERS:
                shutil.copytree(own_data / name, folder / name)
        config.write(folder / "config.yaml")
        for one in job.materials:
            name = one.settings.name
            place = run.room(folder, "classifier", name)
            judges[name].save(place)
            if name in held_out:
                write_classifier_report(place, judges[name], held_out[name])
            for page, content in one.pages.items():
                with writing(place / page) as temporary:
                    temporary.write_bytes(content)
        begun = {
            "command": command or shlex.join(["ctrl", "train", "--config", "config.yaml", "--out", str(folder)]),
            "seconds": seconds,
            "labels": {one.settings.name: len(one.data) for one in job.materials if one.data},
            "dependence": shared,
            "fixed": fixed(config),
        }
        write_text(folder / CHECKPOINT / BEGUN, json.dumps(begun))  # its figures to the bit

    ranks.from_first(lay_out)
    return finish(run, folder, phase)


def finish(run: Run, folder: Path, phase: Phase) -> dict[str, Any]:
    """Train a run whose folder has p̂, from where its checkpoint stands; certify and report it.

    Raises:
        Interrupted: by a signal; what is needed to go on is saved.
        OSError: what cannot be written, and what to do.
    """
    again = f"go on with: ctrl train --resume {folder}"
    try:
        with closing(Tracking(run.config.track, folder, run.config.model_dump())) as tracking:
            return finished(run, folder, phase, tracking)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted. Everything is saved; {again}") from None
    except OSError as error:
        raise OSError(f"{error}. What is saved is whole; {again}") from error


def finished(run: Run, folder: Path, phase: Phase, tracking: Tracking) -> dict[str, Any]:
    """The contents of metrics.json, when all is done that `finish` has to do."""
    config = run.config
    begun = ranks.from_first(lambda: json.loads((folder / CHECKPOINT / BEGUN).read_text(encoding="utf-8")))
    seconds, shared = begun["seconds"], begun["dependence"]
    records, seconds["train"] = train_in(folder, run, phase, tracking)
    ranks.from_first(lambda: run.save_controls(folder))
    with timed(seconds, "sample"):
        evaluation = run.evaluate(config.evaluation.paths, phase)
        followed = run.follow(config.evaluation.paths // 2, phase)
        sweep = run.sweep(STRENGTHS, step_counts(run), config.evaluation.sweep_paths, phase)
        pair = run.conditions.all(1)
        labels, cond = run.conditions.of(pair)
        samples = labelled(run, run.sample(labels, **cond), labels, cond)
        ranks.from_first(lambda: write_imagefolder(folder / "samples", samples))
        shown = Shown.of(run)
    kept = {"stage": records[-1]["stage"], "update": records[-1]["update"], "averaged": "averaged" in records[-1]}
    stages = [record for record in records[:-1] if "averaged" in record or "stopped" in record]
    metrics = {
        "accuracy_by": run.accuracy_by,
        **evaluation.metrics(),
        **({"scale": {name: follows(*pair) for name, pair in followed.items()}} if followed else {}),
        **({"dependence": shared} if shared else {}),
        "training": {"kept": kept, "stages": stages},
        "sweep": sweep_metrics(sweep, evaluation),
        "classifier": classifier_metrics(run.judges),
        "labels": begun["labels"],
        "seconds": {name: round(s, 1) for name, s in {**seconds, "total": sum(seconds.values())}.items()},
        "versions": {"python": python_version(), **{name: version(name) for name in PACKAGES}},
    }

    def close() -> dict[str, Any]:
        write_json(folder / "metrics.json", metrics)
        for group in ("ctrl", "certificate"):
            figures = {f"{group}/{key}": v for key, v in metrics[group].items() if isinstance(v, float)}
            tracking.show(figures)
        write_report(folder, run, metrics, evaluation, sweep, followed, shown, records, begun["command"])
        clear(folder, [f"{CHECKPOINT}/{BEGUN}", CHECKPOINT])
        return metrics

    return ranks.from_first(close)


def resume_job(
    folder: str | Path, command: str | None = None, phase: Phase = silent, trust: bool = False
) -> dict[str, Any]:
    """Go on with a run that was interrupted, however that was, as if it had not been; a finished one stays as it is.

    Args:
        folder: of the run.
        command: what the user typed, for the report if p̂ has still to be fitted.
        phase: told of progress.
        trust: run code that its files name.

    Returns:
        The contents of metrics.json.

    Raises:
        ValueError: there is no run in it, another job is at it, or what it needs is not as it was.
        Interrupted, OSError: as `finish` does.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} has no run to go on with: it has no config.yaml. Begin one with: ctrl train --out")

    def enter() -> tuple[dict[str, Any] | None, bool]:
        """The metrics of a finished run, and whether training has begun."""
        check_writable(folder)
        stack.enter_context(locked(folder))
        if is_finished(folder):
            clear(folder, [CHECKPOINT])  # what a kill while it was removed has left
            return json.loads((folder / "metrics.json").read_text(encoding="utf-8")), True
        clear_unfinished(folder)
        return None, (folder / CHECKPOINT / BEGUN).is_file()

    with ExitStack() as stack, ranks.first_speaks():
        metrics, has_begun = ranks.from_first(enter)
        if metrics:
            return metrics
        config = Config.read(folder / "config.yaml")
        check_trackers(config.track)
        if not has_begun:
            check_code(config.model_dump(), {}, trust, folder / "config.yaml")
            try:
                return execute(prepare(config.model_dump(), phase, trust), folder, False, command, phase)
            except KeyboardInterrupt:
                raise Interrupted("interrupted before training began: the same command goes on.") from None
        check_batches(config)
        ranks.from_first(lambda: check_unchanged(config, folder))
        judges = {name: Judges.load(home(folder, "classifier", name), trust) for name in config.names}
        ranks.from_first(lambda: clear(folder, RESULTS))
        return finish(Run.start(config, as_set(open_prior(config.prior, config.size), config), judges), folder, phase)


def labelled(run: Run, x_0: Tensor, labels: dict[str, Tensor], cond: dict[str, Tensor]) -> LabelledImages:
    """Samples with the labels they were asked for; a null label is blank."""
    values, numbers = {}, {}
    for name, control in run.policy.controls.items():
        y = labels.get(name, torch.full((len(x_0),), NULL))
        values[name], numbers[name] = (*control.values, ""), y  # class −1 picks the last name, the blank
        if y.is_floating_point():
            texts = ["" if place == NULL else f"{number_at(place, control.values):.6g}" for place in y.tolist()]
            values[name] = tuple(dict.fromkeys(texts))
            numbers[name] = torch.tensor([values[name].index(text) for text in texts])
    if not cond:
        return LabelledImages(x_0, numbers, values)
    column = next((control.condition for control in run.config.controls if control.condition), "c")
    return LabelledImages(x_0, {column: cond["c"], **numbers}, {column: run.prior.class_names, **values})


def parse_settings(run: Run, settings: list[str]) -> dict[str, int | float]:
    """The class, or the place on a scale, of every control that `--set CONTROL=VALUE` settings ask for.

    Raises:
        ValueError: not of that form, an unknown control or value.
    """
    chosen = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in run.policy.controls:
            raise ValueError(
                f"--set {setting}: unknown control {name!r}; this run has: {', '.join(run.policy.controls)}."
            )
        try:
            chosen[name] = run.policy.controls[name].label_of(value)
        except ValueError as error:
            raise ValueError(f"--set {setting}: {error}") from error
    return chosen


def sample_job(
    run: Run,
    out: Path,
    settings: list[str],
    c: str | None,
    n: int,
    strength: float = 1.0,
    steps: int | None = None,
    seed: int = 0,
    exact: bool = False,
    overwrite: bool = False,
    phase: Phase = silent,
) -> None:
    """Write n samples, a sheet of them (`grid.png`) and what was asked for (`sample.json`).

    Raises:
        ValueError: a wrong setting or class, a folder that holds something, or too few paths that count (exact).
    """
    y = {name: torch.full((n,), value) for name, value in parse_settings(run, settings).items()}
    y = y or {run.names[0]: torch.full((n,), NULL)}
    cond: dict[str, Tensor] = {}
    if exact and not settings:
        raise ValueError("--exact weighs paths by the label asked for. Give one with --set, or leave --exact out.")
    if c is not None and run.prior.classes is None:
        raise ValueError(f"--class {c}: this prior is unconditional. Leave --class out.")
    if c is not None:
        try:
            cond["c"] = torch.full((n,), run.prior.number_of(c))
        except ValueError as error:
            raise ValueError(f"--class {error}") from error
    elif run.prior.classes is not None:
        classes = torch.tensor(run.config.classes)
        cond["c"] = classes[torch.arange(n) % len(classes)]
    ranks.from_first(lambda: check_room(out, SAMPLE_FILES[-1], overwrite))
    generator = torch.Generator().manual_seed(seed)
    how = {"strength": strength, "steps": steps, "generator": generator, "exact": exact, "phase": phase}
    x_0 = run.sample(y, **how, **cond, latents=True)
    images = run.images(x_0)
    outside, images = run.outside_share(x_0, images), images.clamp(-1, 1)
    asked = {
        "set": settings,
        "class": c,
        "n": n,
        "strength": strength,
        "steps": steps or run.config.steps,
        "seed": seed,
        "exact": exact,
        "outside_support": outside,
    }

    def write() -> None:
        clear(out, SAMPLE_FILES)
        write_imagefolder(out, labelled(run, images, y, cond))
        save_figure(out / "grid.png", sheet_figure(images))
        write_json(out / "sample.json", asked)

    ranks.from_first(write)


def row_by_row(out: Path, files: tuple[str, ...], found: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows into the first of a job's files as they come, the others being cleared away; returns all of them."""
    clear(out, files[1:])
    rows: list[dict[str, Any]] = []
    write_json(out / files[0], {"rows": rows})
    for row in found:
        rows.append(row)
        write_json(out / files[0], {"rows": rows})
    return rows


def exact_job(
    out: Path,
    quick: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    command: str | None = None,
    phase: Phase = silent,
) -> list[dict[str, Any]]:
    """Race the learners on the testbed; writes exact.json after every row, then the pictures and report.html.

    Returns:
        The rows of exact.json.

    Raises:
        ValueError: a folder that cannot be written, or holds something.
    """
    check_room(out, EXACT_FILES[0], overwrite)
    pictures: list[Picture] = []

    def raced() -> Iterator[dict[str, Any]]:
        for row, picture in races(quick, seed, phase):
            pictures.extend([picture] if picture else [])
            yield row

    rows = row_by_row(out, EXACT_FILES, raced())
    write_exact_report(out, rows, pictures, command or "ctrl exact", version("ctrl-diffusion"))
    return rows


def bias_job(
    out: Path,
    quick: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    command: str | None = None,
    phase: Phase = silent,
) -> list[dict[str, Any]]:
    """Say where each method's bias comes from; writes bias.json after every row, then bias.png and report.html.

    Returns:
        The rows of bias.json.

    Raises:
        ValueError: a folder that cannot be written, or holds something.
    """
    check_room(out, BIAS_FILES[0], overwrite)
    rows = row_by_row(out, BIAS_FILES, biases(quick, seed, phase))
    write_bias_report(out, rows, command or "ctrl compare exact", version("ctrl-diffusion"))
    return rows
