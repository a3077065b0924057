"""Fit p̂ on labelled images; train, certify and report a control; add one to a run; resume an interrupted training."""

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...control.conditions import MOST_ENUMERATED
from ...data.labelled import LabelledImages, write_imagefolder
from ...evaluate.learning_curve import learning_curve
from ...prior.prior import open_prior
from ...report.classifier import write_classifier_report
from ...report.pictures import PictureSamples
from ...report.run import write_report
from ...reward.classifiers import fit_panel
from ...reward.panel import Panel
from ...run.config import Config, ControlSettings, check_code, check_present, list_controls
from ...run.defaults import quick
from ...run.folder import CLASSIFIER_FILES, CURVE, DATA_FOLDERS, KEPT, RunFolder, StartRecord, fixed_settings
from ...run.measure import Measurements, find_intervals, lower_gamma, probe
from ...run.metrics import RunMetrics
from ...run.prepare import (
    ControlInputs,
    PreparedTraining,
    check_batches,
    dependences,
    encoder_of,
    prepare,
    prompts_of,
    read_inputs,
    select_inputs,
)
from ...run.run import Run, configured, find_run
from ...run.stages import budgeted, probe_repeats, speed_of, stages_of, train_in
from ...run.state import BestControl, TrainingState
from ...system import ranks
from ...system.files import atomic, write_json, write_text
from ...system.folders import check_output, check_writable, clear, clear_unfinished, locked
from ...system.progress import DEFAULT, Interrupted, JobOptions, Phase, seconds_in, silent, timed
from ...system.tracking import Tracking, check_trackers
from ..line.places import check_resumable
from .sample import labelled


def classifier_job(
    settings: ControlSettings, out: Path, prior: str | None = None, seed: int = 0, options: JobOptions = DEFAULT,
    size: tuple[int, int] | None = None, curve: bool = False,
) -> Panel:  # fmt: skip
    """Fit p̂, the judge, and the reader of a condition on labelled images, and report them in the folder `out`.

    Settings are as for a training; a ruler or an earlier classifier is ignored. With a prior (a pipeline folder) images
    are read at its `size`, (height, width) if it can make several; else they keep their own. With `curve` p̂ is also
    fitted on growing shares of the labels, into curve.json (`learning_curve`).
    """
    check_output(out, CLASSIFIER_FILES[-1], options.overwrite)
    if size and not prior:
        raise ValueError("size is that of a prior's images. Give --prior, or leave size out.")
    settings = settings.model_copy(update=dict.fromkeys(("ruler", "classifier_from", "settled_from")))
    name, condition = settings.name, settings.condition
    model = open_prior(prior, size).placed() if prior else None
    if condition and model and model.text and settings.classifier.conditional:
        prompts = prompts_of([settings])
        model = model.with_prompts(prompts, cache=out.absolute().parent if len(prompts) > MOST_ENUMERATED else None)
    inputs = read_inputs(settings, model, options)
    assert inputs.data is not None  # no earlier classifier or run stands for it
    inputs = select_inputs(inputs, inputs.data.labels[condition].unique().tolist() if condition else None, model)
    inputs.report(options.say)
    assert inputs.data is not None  # the classes that stay
    shared: dict[str, Any] = {"seed": seed, "phase": options.phase, "encode": encoder_of(model)}
    shared["device"] = model.denoiser.device if model else "cpu"
    panel, held_out = fit_panel(
        inputs.data, name, condition, settings=settings.classifier, judge_data=inputs.judge_data,
        read=inputs.unread is None, **shared,
    )  # fmt: skip
    judged = inputs.judge_data is not None
    measured = learning_curve(inputs.data, panel, judged, **shared, say=options.say) if curve else None
    clear(out, CLASSIFIER_FILES)
    panel.save(out)
    if measured:
        write_json(out / CURVE, measured.as_dict())
    write_classifier_report(out, panel, held_out, measured)
    if measured:
        options.say(f"learning curve of {name}:\n{measured.in_words()}")
    return panel


@contextmanager
def reserved(folder: RunFolder, overwrite: bool) -> Iterator[None]:
    """Keep a folder for one run, if it is free or may be overwritten; of several ranks the main one locks it."""

    def reserve() -> None:
        if folder.has_begun and not overwrite:
            advice = f"Go on with it by ctrl train --resume {folder}, or pass --overwrite."
            raise ValueError(f"{folder} is a run that did not finish. {advice}")
        folder.check_free(overwrite)
        stack.enter_context(locked(folder.path))

    try:
        with ExitStack() as stack, ranks.main_warns():
            ranks.broadcast(reserve)
            yield
    except KeyboardInterrupt:
        command = "the same command" + (" with --overwrite" if folder.is_ours else "")
        raise Interrupted(f"interrupted before training began: {command} begins again.") from None


def train_job(
    given: dict[str, Any], out: str | Path, overwrite: bool = False, quick: bool = False, command: str | None = None,
    phase: Phase = silent, trust: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train a control, certify it and report it in a run folder; return the contents of metrics.json.

    Args:
        given: settings by the names of `Config`, of which prior, data and control must be there.
        out: the run folder.
        overwrite, quick, command, phase, trust: see `JobOptions`.

    Raises:
        ValueError: the settings, data or folder are not as they should be, or p̂ is no better than chance.
        Interrupted, MemoryError, OSError: what happened, and how to go on (`resume_job`).
    """
    return train_with(given, Path(out), JobOptions(phase, trust, overwrite, quick, command))


def train_with(given: dict[str, Any], out: Path, options: JobOptions) -> dict[str, Any]:
    """Train as `train_job` does, with its options in one object."""
    with reserved(folder := RunFolder(out), options.overwrite):
        return start_training(prepare(given, options, beside=folder.path.parent), folder, options)


def add_job(run: str | Path, given: dict[str, Any], out: Path, options: JobOptions = DEFAULT) -> dict[str, Any]:
    """Train one more control on a finished run, which is not changed and whose controls stay fixed; see `train_job`.

    Prior, chain, classes and γ are the run's; `given` has the new control and its training.
    """
    RunFolder(out).check_free(options.overwrite)
    old = Run.load(run, trust=options.trust).config
    fixed = [{**control.model_dump(), "settled_from": str(find_run(run).resolve())} for control in old.controls]
    given = list_controls(given)
    check_present(given)
    settings = {**given, **old.model_dump(include=KEPT), "controls": [*fixed, *given["controls"]]}
    return train_with(settings, out, options)


def start_training(
    job: PreparedTraining, folder: RunFolder, options: JobOptions, demo_data: Path | None = None
) -> dict[str, Any]:
    """Fit every p̂ of a prepared training, write the run folder, and train; `demo_data` has datasets to copy into it.

    The folder stays untouched until every p̂ is fitted and accepted; from then on the run can be resumed at any moment.
    """
    config = quick(job.config) if options.quick else job.config
    seconds: dict[str, float] = {}
    with timed(seconds, "classifier"):
        panels, held_out = fit_panels(job, config, options.phase)
    dependence = dependences(job.inputs, panels, job.prior)
    job.prior.codec.cpu()  # until there is something to decode
    run = Run.start(config, job.prior, panels)
    if config.kl_budget:
        lower_gamma(run, config.kl_budget, options.phase)
    find_intervals(run, options.phase)
    cut = bool(options.quick or job.cut or config.time or config.updates)
    run.config = budgeted(run, run.config)
    command = options.command or shlex.join(["ctrl", "train", "--config", "config.yaml", "--out", str(folder)])
    labels = {inputs.name: len(inputs.data) for inputs in job.inputs if inputs.data}
    if isinstance(run.config.prompts, str):
        run.config = run.config.with_(prompts=str(folder.prompts.resolve()))
    start = StartRecord(command, seconds, labels, dependence, {}, cut)
    ranks.broadcast(lambda: write_start(folder, job, run, held_out, start, demo_data))
    return finish_training(run, folder, options.phase)


def fit_panels(
    job: PreparedTraining, config: Config, phase: Phase
) -> tuple[dict[str, Panel], dict[str, LabelledImages]]:
    """Fit the p̂ that were not handed over; return all of them, and the held-out images of those that were fitted.

    The main rank fits for all: fits on accelerators are not alike to the bit, and ranks that decide differently would
    wait for each other for ever.
    """
    device = job.prior.denoiser.device
    held_out: dict[str, LabelledImages] = {}

    def fit(inputs: ControlInputs) -> Panel:
        name, settings = inputs.name, config.settings_of(inputs.name)
        assert inputs.data is not None  # of a control whose p̂ is not brought along
        panel, held_out[name] = fit_panel(
            inputs.data, name, settings.condition, bool(settings.ruler), settings.classifier, config.seed, phase,
            inputs.judge_data, encoder_of(job.prior), device, read=inputs.unread is None,
        )  # fmt: skip
        return panel.to(torch.device("cpu"))

    panels = {inputs.name: inputs.panel or ranks.broadcast(partial(fit, inputs)).to(device) for inputs in job.inputs}
    return panels, held_out


def write_start(
    folder: RunFolder, job: PreparedTraining, run: Run, held_out: dict[str, LabelledImages], start: StartRecord,
    demo_data: Path | None,
) -> None:  # fmt: skip
    """Clear a run folder, and write all that training needs: settings, classifiers, and last the start record."""
    folder.clear(data=demo_data is not None)
    if demo_data:
        for name in filter(lambda name: (demo_data / name).is_dir(), DATA_FOLDERS):
            shutil.copytree(demo_data / name, folder.path / name)
    if isinstance(run.config.prompts, str) and job.prompts is not None:
        write_text(folder.prompts, "".join(f"{prompt}\n" for prompt in job.prompts))
    run.config.write(folder.config)
    start.fixed = fixed_settings(run.config)
    for inputs in job.inputs:
        path, panel = folder.classifier(inputs.name), run.panels[inputs.name]
        panel.save(path)
        if inputs.name in held_out:
            write_classifier_report(path, panel, held_out[inputs.name])
        for page, content in inputs.pages.items():
            with atomic(path / page) as temporary:
                temporary.write_bytes(content)
    folder.write_start(start)


def finish_training(run: Run, folder: RunFolder, phase: Phase) -> dict[str, Any]:
    """Train a run whose folder has p̂, from its last checkpoint; certify and report it; return metrics.json.

    What is needed to go on is saved at an interruption or an OSError, and the message says how to.
    """
    advice = f"go on with: ctrl train --resume {folder}"
    try:
        with closing(Tracking(run.config.track, folder.path, run.config.model_dump())) as tracking:
            return train_and_report(run, folder, phase, tracking)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted. Everything is saved; {advice}") from None
    except OSError as error:
        raise OSError(f"{error}. What is saved is whole; {advice}") from error


def train_and_report(run: Run, folder: RunFolder, phase: Phase, tracking: Tracking) -> dict[str, Any]:
    """Train, save the controls, measure, and write samples, metrics.json and report.html; see `finish_training`."""
    start = ranks.broadcast(folder.read_start)
    records, start.seconds["train"] = train_in(folder, run, phase, tracking)
    ranks.broadcast(lambda: run.save_controls(folder))
    with timed(start.seconds, "sample"):
        measurements = Measurements.from_run(run, phase)
        labels, cond = run.conditions.of(run.conditions.all(1))
        samples = labelled(run, run.sample(labels, cond.get("c")), labels, cond)
        ranks.broadcast(lambda: write_imagefolder(folder.samples, samples))
        pictures = PictureSamples.from_run(run, measurements.evaluation)

    def report() -> dict[str, Any]:
        metrics = RunMetrics.from_run(run, measurements, records, start)
        write_json(folder.metrics, values := metrics.as_dict())
        for group in ("ctrl", "certificate"):
            tracking.log_metrics({f"{group}/{key}": v for key, v in values[group].items() if isinstance(v, float)})
        write_report(folder, run, metrics, measurements, pictures, records, start.command)
        folder.clear_checkpoint()
        return values

    return ranks.broadcast(report)


def resume_job(
    folder: str | Path, command: str | None = None, phase: Phase = silent, trust: bool = False
) -> dict[str, Any]:
    """Resume an interrupted run, with the results it would have had, or leave a finished one; return metrics.json.

    Args:
        folder: of the run.
        command, phase, trust: see `JobOptions`.

    Raises:
        ValueError: there is no run in it, another job is at it, or what it needs is not as it was.
        Interrupted, OSError: as `finish_training` does.
    """
    files, options = RunFolder(folder), JobOptions(phase, trust, command=command)
    check_resumable(files.path)

    def reserve() -> tuple[dict[str, Any] | None, bool]:
        """Lock the folder; return the metrics of a finished run, and whether training has begun."""
        check_writable(files.path)
        stack.enter_context(locked(files.path))
        if files.is_finished:
            files.clear_checkpoint()  # which a kill may have left half removed
            return files.read_metrics(), True
        clear_unfinished(files.path)
        return None, files.has_begun

    with ExitStack() as stack, ranks.main_warns():
        metrics, has_begun = ranks.broadcast(reserve)
        if metrics:
            return metrics
        unread = () if has_begun else ("data", "judge_data", "classifier_from")
        config = files.read_config("prior", "settled_from", *unread)
        check_trackers(config.track)
        if not has_begun:
            check_code(config.model_dump(), {}, trust, files.config)
            try:
                job = prepare(config.model_dump(), options, beside=files.path.parent)
                return start_training(job, files, options)
            except KeyboardInterrupt:
                raise Interrupted("interrupted before training began: the same command goes on.") from None
        check_batches(config)
        ranks.broadcast(lambda: files.check_unchanged(config))
        panels = {name: Panel.load(files.classifier(name), trust) for name in config.names}
        ranks.broadcast(files.clear_results)
        prior = configured(open_prior(config.prior, config.size), config)
        return finish_training(Run.start(config, prior, panels), files, phase)


def extend_job(
    folder: str | Path, time: str | None = None, updates: int | None = None, options: JobOptions = DEFAULT
) -> dict[str, Any]:
    """Train a finished run on from its kept control, measure and report it again; return the new metrics.json.

    A stage of its last learner is added (`more` in its config), so that a training by that config ends with the same
    bytes. A run that is not finished is refused.

    Args:
        folder: of the run.
        time: to train, which is turned into updates once.
        updates: to train, instead of a time.
        options: see `JobOptions`.
    """
    if bool(time) == bool(updates):
        raise ValueError("give either --time or --updates to go on with a finished run.")
    files = RunFolder(folder)

    def reserve() -> None:
        if not files.is_finished:
            raise ValueError(
                f"{files} is no finished run. Finish it first: ctrl train --resume {files}, without --time"
            )
        check_writable(files.path)
        stack.enter_context(locked(files.path))

    with ExitStack() as stack, ranks.main_warns():
        ranks.broadcast(reserve)
        run, training, start = reopen(files, options)
        config, last = run.config, run.config.learners[-1]
        settings = getattr(config, last)
        if time:
            seconds = speed_of(run, settings.batch).of_update(settings, config.steps)
            updates = max(1, int(seconds_in(time) / seconds))
        run.config = config.with_(more=[*config.more, updates])
        check_trackers(config.track)
        training.update({})  # from here on an interruption leaves a run to resume
        ranks.broadcast(lambda: files.write_start(start))
        ranks.broadcast(lambda: run.config.write(files.config))
        ranks.broadcast(files.clear_results)
        return finish_training(run, files, options.phase)


def reopen(folder: RunFolder, options: JobOptions) -> tuple[Run, TrainingState, StartRecord]:
    """Return a finished run as it was before its first update, the state after its last, and what it began with."""
    config, metrics = folder.read_config("prior", "settled_from"), folder.read_metrics()
    loaded = Run.load(folder.path, config.device, options.trust)
    for control in config.controls:
        if control.settled_from:
            loaded.policy.controls[control.name].fix()
    kept, repeats = loaded.policy.snapshot(), probe_repeats(loaded)
    run = Run.start(config, configured(open_prior(config.prior, config.size), config), loaded.panels)
    for name, trained in run.policy.controls.items():
        trained.interval = loaded.policy.controls[name].interval
    *records, record = map(json.loads, folder.log.read_text(encoding="utf-8").splitlines())
    best = BestControl(run.policy, probe(run, repeats).figures["J"])
    with run.policy.holding(kept):
        _, best.log_w, best.rewards = probe(run, repeats)
    best.record, best.snapshot = {key: value for key, value in record.items() if key != "kept"}, kept
    training = TrainingState(best, folder.checkpoints, len(list(stages_of(config))), records)
    training.seconds = metrics["seconds"]["train"]
    command = options.command or shlex.join(["ctrl", "train", "--config", "config.yaml", "--out", str(folder)])
    dependence, seconds = metrics.get("dependence") or {}, {"classifier": metrics["seconds"]["classifier"]}
    cut = metrics.get("verdict", {}).get("cut", False)
    return run, training, StartRecord(command, seconds, metrics["labels"], dependence, fixed_settings(config), cut)
