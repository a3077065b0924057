"""The jobs behind the commands: from labelled images to p̂, and from a prior and p̂ to a certified control."""

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from ...data.labelled import LabelledImages, write_imagefolder
from ...prior.prior import open_prior
from ...report.classifier import write_classifier_report
from ...report.run import write_report
from ...reward.classifiers import Panel, fit_panel
from ...run.config import Config, ControlSettings, check_code, check_present, list_controls
from ...run.defaults import quick
from ...run.folder import (
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
from ...run.measure import STRENGTHS, Shown, classifier_metrics, follows, step_counts, sweep_metrics
from ...run.prepare import (
    ControlInputs,
    PreparedTraining,
    check_batches,
    dependences,
    encoder_of,
    keep_classes,
    material,
    prepare,
)
from ...run.run import Run, configured
from ...run.stages import train_in
from ...system import ranks
from ...system.files import write_json, write_text, writing
from ...system.folders import check_room, check_writable, clear, clear_unfinished, locked
from ...system.progress import DEFAULT, Interrupted, JobOptions, Phase, silent, timed
from ...system.tracking import Tracking, check_trackers
from .sample import labelled

PACKAGES = ("ctrl-diffusion", "torch", "diffusers", "peft", "accelerate", "scikit-learn")


def classifier_job(
    settings: ControlSettings,
    out: Path,
    prior: str | None = None,
    seed: int = 0,
    options: JobOptions = DEFAULT,
    size: tuple[int, int] | None = None,
) -> Panel:
    """Fit p̂, the judge, and the reader of a condition on labelled images, and report them.

    Args:
        settings: of the control, as of a training; a ruler, or what was fitted before, is left aside.
        out: the folder to write.
        prior: a pipeline folder, at whose size the images are read; None takes them as they are.
        seed: of the parts and the fits.
        options: progress and overwriting.
        size: (height, width) of the prior's images, of one that makes any.

    Raises:
        ValueError: the data or the folder are not as they should be, or p̂ is no better than chance.
    """
    check_room(out, CLASSIFIER_FILES[-1], options.overwrite)
    if size and not prior:
        raise ValueError("size is that of a prior's images. Give --prior, or leave size out.")
    settings = settings.model_copy(update=dict.fromkeys(("ruler", "classifier_from", "settled_from")))
    name, condition = settings.name, settings.condition
    model = open_prior(prior, size).placed() if prior else None
    one = material(settings, model, options)
    keep_classes(one, one.data.labels[condition].unique().tolist() if condition else None)
    panel, held_out = fit_panel(
        one.data, name, condition, settings=settings.classifier, seed=seed, phase=options.phase,
        judge_data=one.judge_data, encode=encoder_of(model), device=model.denoiser.device if model else "cpu",
    )  # fmt: skip
    clear(out, CLASSIFIER_FILES)
    panel.save(out)
    write_classifier_report(out, panel, held_out)
    return panel


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
        with ExitStack() as stack, ranks.main_warns():
            ranks.broadcast(enter)
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
    """Train a control, certify it and report it in a run folder; see `JobOptions` for what stands by its own name here.

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
    return train_with(given, Path(out), JobOptions(phase, trust, overwrite, quick, command))


def train_with(given: dict[str, Any], out: Path, options: JobOptions) -> dict[str, Any]:
    """Train as `train_job` does."""
    with occupied(out, options.overwrite):
        return execute(prepare(given, options), out, options)


def add_job(
    run: str | Path,
    given: dict[str, Any],
    out: Path,
    options: JobOptions = DEFAULT,
) -> dict[str, Any]:
    """Train one more control on a finished run, whose own controls stay as they are; otherwise as `train_job`.

    Args:
        run: the run folder; it is not changed.
        given: settings by the names of `Config`: of the new control and its training. Prior, chain, classes and γ are
            the run's.
        out: the new run folder.
        options: see `train_job`.
    """
    check_room(out, RUN_FILES[-1], options.overwrite)
    old = Run.load(run, trust=options.trust).config
    here = str(Path(run).resolve())
    settled = [{**control.model_dump(), "settled_from": here} for control in old.controls]
    given = list_controls(given)
    check_present(given)
    kept = old.model_dump(include=KEPT)
    whole = {**given, **kept, "controls": [*settled, *given["controls"]]}
    return train_with(whole, out, options)


def execute(job: PreparedTraining, folder: Path, options: JobOptions, own_data: Path | None = None) -> dict[str, Any]:
    """Do a prepared training in a run folder; `own_data` holds datasets that become the run's.

    The folder is not touched before every p̂ has shown that it is worth a training. What is needed from then on to go
    on at any moment lies in its checkpoint/, which goes when the run is finished. Rank 0 fits p̂ for all: fits on
    accelerators are alike, but not to the bit, and ranks that decide differently would wait for each other for ever.
    """
    config = quick(job.config) if options.quick else job.config
    device, seconds = job.prior.denoiser.device, {}
    panels: dict[str, Panel] = {}
    held_out: dict[str, LabelledImages] = {}
    with timed(seconds, "classifier"):
        for one in job.materials:
            name = one.settings.name

            def fitted(one: ControlInputs = one, name: str = name) -> Panel:
                s = config.settings_of(name)
                found, held_out[name] = fit_panel(
                    one.data, name, s.condition, bool(s.ruler), s.classifier, config.seed, options.phase,
                    one.judge_data, encoder_of(job.prior), device,
                )  # fmt: skip
                return found.to("cpu")

            panels[name] = one.panel or ranks.broadcast(fitted).to(device)
    shared = dependences(job.materials, panels, job.prior)
    job.prior.codec.cpu()  # until there is something to decode
    run = Run.start(config, job.prior, panels)
    if config.kl_budget:
        run.spend(config.kl_budget, options.phase)

    def lay_out() -> None:
        clear(folder, RUN_FILES if own_data is None else (RUN_FILES[0], *DATA_FOLDERS, *RUN_FILES[1:]))
        (folder / RUN_FILES[-1]).touch()
        if own_data:
            for name in DATA_FOLDERS:
                shutil.copytree(own_data / name, folder / name)
        run.config.write(folder / "config.yaml")
        for one in job.materials:
            name = one.settings.name
            place = run.room(folder, "classifier", name)
            panels[name].save(place)
            if name in held_out:
                write_classifier_report(place, panels[name], held_out[name])
            for page, content in one.pages.items():
                with writing(place / page) as temporary:
                    temporary.write_bytes(content)
        begun = {
            "command": options.command
            or shlex.join(["ctrl", "train", "--config", "config.yaml", "--out", str(folder)]),
            "seconds": seconds,
            "labels": {one.settings.name: len(one.data) for one in job.materials if one.data},
            "dependence": shared,
            "fixed": fixed(run.config),
        }
        write_text(folder / CHECKPOINT / BEGUN, json.dumps(begun))  # its figures to the bit

    ranks.broadcast(lay_out)
    return finish(run, folder, options.phase)


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
    begun = ranks.broadcast(lambda: json.loads((folder / CHECKPOINT / BEGUN).read_text(encoding="utf-8")))
    seconds, shared = begun["seconds"], begun["dependence"]
    records, seconds["train"] = train_in(folder, run, phase, tracking)
    ranks.broadcast(lambda: run.save_controls(folder))
    with timed(seconds, "sample"):
        evaluation = run.evaluate(config.evaluation.paths, phase)
        followed = run.follow(config.evaluation.paths // 2, phase)
        sweep = run.sweep(STRENGTHS, step_counts(run), config.evaluation.sweep_paths, phase)
        pair = run.conditions.all(1)
        labels, cond = run.conditions.of(pair)
        samples = labelled(run, run.sample(labels, **cond), labels, cond)
        ranks.broadcast(lambda: write_imagefolder(folder / "samples", samples))
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
        "classifier": classifier_metrics(run.panels),
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

    return ranks.broadcast(close)


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
    folder, options = Path(folder), JobOptions(phase, trust, command=command)
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

    with ExitStack() as stack, ranks.main_warns():
        metrics, has_begun = ranks.broadcast(enter)
        if metrics:
            return metrics
        config = Config.read(folder / "config.yaml")
        check_trackers(config.track)
        if not has_begun:
            check_code(config.model_dump(), {}, trust, folder / "config.yaml")
            try:
                return execute(prepare(config.model_dump(), options), folder, options)
            except KeyboardInterrupt:
                raise Interrupted("interrupted before training began: the same command goes on.") from None
        check_batches(config)
        ranks.broadcast(lambda: check_unchanged(config, folder))
        panels = {name: Panel.load(home(folder, "classifier", name), trust) for name in config.names}
        ranks.broadcast(lambda: clear(folder, RESULTS))
        return finish(
            Run.start(config, configured(open_prior(config.prior, config.size), config), panels), folder, phase
        )
