"""The jobs behind the commands: from labelled images to p̂, and from a prior and p̂ to a certified control."""

import json
import math
import shlex
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from . import demo
from .config import EMBEDDED, PATHS, ClassifierSettings, Config, LearnerSettings, merged, suggested
from .control import NULL, Policy
from .data import LabelledImages, read_imagefolder, write_imagefolder
from .evaluate import Evaluation, Score
from .files import check_room, clear, rounded, write_json, writing
from .judges import Judges, fit_judges
from .learn import Learner
from .learn.adjoint import Adjoint
from .learn.backprop import Backprop
from .learn.ppo import PPO
from .learn.weighted import RENOISING, Weighted
from .pretrained import Prior
from .progress import Phase, silent
from .report import save_figure, sheet_figure, write_classifier_report, write_exact_report, write_report
from .reward import prior_table
from .run import Run, open_prior
from .sample import stream
from .testbed import races
from .train import fit

# what each job writes; the last tells its folder from anybody else's
PAGES = ("reliability.png", "confusion.png", "report.html")
CLASSIFIER_FILES = ("judge", "reader", *PAGES, "support.safetensors", "classifier.safetensors", "classifier.json")
RUN_FILES = (
    "classifier", "control", "samples", "metrics.json", "report.html", "grid.png", "curves.png", "accuracy.png",
    "confusion.png", "reliability.png", "sweep.png", "config.yaml", "progress.jsonl",
)  # fmt: skip
DATA_FOLDERS = ("data", "judge_data")  # of a demo
SAMPLE_FILES = ("metadata.csv", "[0-9][0-9][0-9][0-9][0-9].png", "grid.png", "sample.json")
EXACT_FILES = ("exact.json", "report.html", "density.png", "gap.png", "growth.png")
MOST_CONDITIONS = 20
PACKAGES = ("ctrl-diffusion", "torch", "diffusers", "peft", "accelerate", "scikit-learn")
COLLAPSE = 10.0  # nats
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)


def read_data(
    folder: Path, control: str, condition: str | None, prior: Prior | None, values: tuple[str, ...] | None = None
) -> LabelledImages:
    """An imagefolder as a job needs it: at the prior's size, classes of c numbered as the prior numbers them.

    Args:
        folder: the imagefolder.
        control, condition: columns of y and c.
        prior: None takes the images as they are.
        values: the classes p̂ knows, None for those that occur.

    Raises:
        ValueError: the data are not as they should be, or the prior has no condition.
    """
    if condition and prior and prior.classes is None:
        raise ValueError(f"--condition {condition}: this prior is unconditional. Leave --condition out.")
    if condition == control:
        raise ValueError(f"--condition and --control both name the column {control!r}.")
    columns = {control: values and {value: i for i, value in enumerate(values)}}
    if condition:
        columns[condition] = prior and prior.names
    return read_imagefolder(folder, columns, prior and prior.denoiser.shape)


def only(data: LabelledImages, condition: str, classes: list[int]) -> LabelledImages:
    """The rows whose condition is one of `classes`, its labels counted within them, as a reader needs them."""
    rows, numbers = (data.labels[condition][:, None] == torch.tensor(classes)).nonzero(as_tuple=True)
    data = data[rows]
    values = tuple(data.values[condition][c] for c in classes)
    return LabelledImages(data.x, {**data.labels, condition: numbers}, {**data.values, condition: values})


def classifier_job(
    folder: Path,
    control: str,
    condition: str | None,
    out: Path,
    prior: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    phase: Phase = silent,
    settings: ClassifierSettings | None = None,
) -> Judges:
    """Fit p̂, the judge, and the reader of a condition on an imagefolder, and report them.

    Args:
        folder: the imagefolder.
        control, condition: columns of y and c.
        out: the folder to write.
        prior: a pipeline folder, at whose size the images are read; None takes them as they are.
        seed: of the parts and the fits.
        overwrite: whether an earlier classifier in `out` may go.
        phase: told of progress.
        settings: of the classifiers.

    Raises:
        ValueError: the data or the folder are not as they should be, or p̂ is no better than chance.
    """
    check_room(out, CLASSIFIER_FILES[-1], overwrite)
    data = read_data(folder, control, condition, open_prior(prior) if prior else None)
    if condition:
        data = only(data, condition, data.labels[condition].unique().tolist())
    judges, held_out = fit_judges(data, control, condition, settings=settings, seed=seed, phase=phase)
    clear(out, CLASSIFIER_FILES)
    judges.save(out)
    write_classifier_report(out, judges, held_out)
    return judges


@dataclass
class Job:
    """A training that is ready to start: everything that can be refused has been looked at.

    Args:
        config: whole.
        prior, data, judge_data: as read.
        judges: as read, None if they are to be fitted.
        pages: of the classifier that was handed over, by name.
    """

    config: Config
    prior: Prior
    data: LabelledImages
    judges: Judges | None
    pages: dict[str, bytes]
    judge_data: LabelledImages | None = None


def prepare(given: dict[str, Any]) -> Job:
    """Read prior, data and classifier; fill in the settings that depend on them.

    Args:
        given: settings by the names of `Config`, of which prior, data and control must be there.

    Raises:
        ValueError: whatever is wrong with them.
    """
    for name in ("prior", "data", "control"):
        if not given.get(name):
            raise ValueError(f"--{name} is missing. Give it, or a --config that has it.")
    of_c = Config.of(given).classifier.conditional  # mistakes in the settings come before mistakes in the files
    given = {**given, **{k: str(Path(given[k]).resolve()) for k in PATHS if given.get(k) and given[k] != EMBEDDED}}
    control, condition, handed = (given.get(name) for name in ("control", "condition", "classifier_from"))
    prior, judges, pages = open_prior(given["prior"], given.get("unconditional", False)), None, {}
    if handed:
        judges, pages = Judges.load(Path(handed)), {name: (Path(handed) / name).read_bytes() for name in PAGES}
        check_classifier(judges, handed, control, prior.denoiser.shape)
    data = read_data(Path(given["data"]), control, condition, prior, judges and judges.values)
    classes = given.get("classes") or conditions_of(prior, data, condition)
    check_classes(prior, classes)
    if classes and condition:
        data = only(data, condition, classes)
    if judges:
        check_judges(judges, handed, data, condition, bool(given.get("ruler")))
    else:
        data.check_classes(control)
    judge_data = None
    if given.get("judge_data") and not judges:
        column = condition if of_c else None
        judge_data = read_data(Path(given["judge_data"]), control, column, prior, data.values[control])
        judge_data = only(judge_data, condition, classes) if column else judge_data
        judge_data.check_classes(control)
    if given.get("ruler") and data.values[control] != demo.VALUES[demo.CONTROL[0]]:
        raise ValueError(f"ruler: {given['ruler']} measures {demo.CONTROL[0]}, not {control!r}. Leave the ruler out.")
    site, parameters = prior.denoiser.site, sum(p.numel() for p in prior.denoiser.network.parameters())
    defaults = suggested(
        prior.denoiser.shape, parameters, site.rank, groups=len(classes or [0]), classes=len(data.values[control])
    )
    config = Config.of({**merged(defaults, given), "classes": classes})
    while "steps" not in given and config.steps > 1 and not fits(prior, config, config.steps):
        config.steps -= 1  # a prior of few timesteps
    prior.denoiser.times(config.steps, config.sigma_end, config.time_power)
    if config.evaluation.prior_samples < len(data.values[control]):
        raise ValueError("evaluation.prior_samples must be at least the number of the control's classes.")
    return Job(config, prior, data, judges, pages, judge_data)


def fits(prior: Prior, config: Config, steps: int) -> bool:
    """Whether the prior's schedule has a chain of so many steps."""
    try:
        prior.denoiser.times(steps, config.sigma_end, config.time_power)
    except ValueError:
        return False
    return True


def check_classes(prior: Prior, classes: list[int] | None) -> None:
    """Refuse `classes` that are not the prior's."""
    known = range(prior.classes or 0)
    if classes and (len(set(classes)) < len(classes) or not set(classes) <= set(known)):
        what = f"different numbers in 0 … {known[-1]}" if known else "null: this prior is unconditional"
        raise ValueError(f"classes must be {what}; got {classes}.")


def check_classifier(judges: Judges, folder: str, control: str, shape: tuple[int, ...]) -> None:
    """Refuse a classifier of another control or of images of another size."""
    if judges.control != control or judges.shape != shape:
        raise ValueError(
            f"the classifier in {folder} is of {judges.control!r} on images of {judges.shape}; needed: {control!r} on "
            f"{shape}. Fit it with ctrl classifier --prior."
        )


def check_judges(judges: Judges, folder: str, data: LabelledImages, condition: str | None, ruler: bool) -> None:
    """Refuse a classifier that lacks its judge, or reads other classes; a reader nobody asked for is left aside."""
    if judges.judge is None and not ruler:
        raise ValueError(f"the classifier in {folder} has no judge. Fit it with ctrl classifier.")
    if condition is None and judges.classifier.conditional:
        raise ValueError(f"the classifier in {folder} is p̂(y | x, c). Name the column of c with --condition.")
    if condition is None:
        judges.reader = judges.reader_accuracy = None
    elif (judges.condition, judges.condition_values) != (condition, data.values[condition]):
        raise ValueError(
            f"the classifier in {folder} has no reader of {condition!r} for the classes "
            f"{', '.join(data.values[condition])}. Fit it with ctrl classifier --prior --condition."
        )


def conditions_of(prior: Prior, data: LabelledImages, condition: str | None) -> list[int] | None:
    """The prior's classes to train and certify: those in the data, else all, else some evenly spaced."""
    if prior.classes is None:
        return None
    if condition:
        return data.labels[condition].unique().tolist()
    if prior.classes > MOST_CONDITIONS:
        warnings.warn(
            f"the prior has {prior.classes} classes and the data no --condition: {MOST_CONDITIONS} of them, evenly "
            "spaced, are trained and certified. Name others as classes: in a --config.",
            stacklevel=2,
        )
    chosen = torch.linspace(0, prior.classes - 1, min(prior.classes, MOST_CONDITIONS))
    return chosen.round().long().tolist()


def train_job(
    given: dict[str, Any],
    out: str | Path,
    overwrite: bool = False,
    quick: bool = False,
    command: str | None = None,
    phase: Phase = silent,
) -> dict[str, Any]:
    """Train a control, certify it and report it in a run folder.

    Args:
        given: settings by the names of `Config`, of which prior, data and control must be there.
        out: the run folder.
        overwrite: whether an earlier run in `out` may go.
        quick: a twentieth of the training, a smoke test.
        command: what the user typed, for the report.
        phase: told of progress.

    Returns:
        The contents of metrics.json.

    Raises:
        ValueError: the settings, data or folder are not as they should be, or p̂ is no better than chance.
    """
    out = Path(out)
    check_room(out, RUN_FILES[-1], overwrite)
    return execute(prepare(given), out, quick, command, phase)


def demo_job(
    given: dict[str, Any],
    out: str | Path,
    overwrite: bool = False,
    quick: bool = False,
    command: str | None = None,
    phase: Phase = silent,
    control: str = demo.CONTROL[0],
) -> dict[str, Any]:
    """`train_job` on the embedded prior with labelled digits, and others for the judge, written into the run folder."""
    out = Path(out)
    if control not in demo.SETTINGS:
        raise ValueError(f"the demo's controls are {', '.join(demo.SETTINGS)}; got {control!r}.")
    check_room(out, RUN_FILES[-1], overwrite)
    given = merged(demo.SETTINGS[control], given)
    with TemporaryDirectory() as scratch:
        folders = dict(zip(DATA_FOLDERS, demo.labelled_digits(control, given.get("seed", 0)), strict=True))
        for name, data in folders.items():
            write_imagefolder(Path(scratch) / name, data)
        job = prepare({**given, **{name: f"{scratch}/{name}" for name in folders}})
        for name in folders:
            setattr(job.config, name, str((out / name).resolve()))
        return execute(job, out, quick, command, phase, Path(scratch))


def execute(
    job: Job, folder: Path, quick: bool, command: str | None, phase: Phase, own_data: Path | None = None
) -> dict[str, Any]:
    """Do a prepared training in a run folder; `own_data` holds datasets that become the run's.

    The folder is not touched before p̂ has shown that it is worth a training.
    """
    config, seconds = job.config.quick() if quick else job.config, {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - begin, 1)

    with timed("classifier"):
        judges, held_out = job.judges, None
        if judges is None:
            ruler = bool(config.ruler)
            judges, held_out = fit_judges(
                job.data, config.control, config.condition, ruler, config.classifier, config.seed, phase, job.judge_data
            )
    run = Run.start(config, job.prior, judges)
    if config.kl_budget:
        run.spend(config.kl_budget, phase)
    clear(folder, RUN_FILES if own_data is None else (*DATA_FOLDERS, *RUN_FILES))
    (folder / RUN_FILES[-1]).touch()
    if own_data:
        for name in DATA_FOLDERS:
            shutil.copytree(own_data / name, folder / name)
    config.write(folder / "config.yaml")
    judges.save(folder / "classifier")
    if held_out is not None:
        write_classifier_report(folder / "classifier", judges, held_out)
    for name, page in job.pages.items():
        with writing(folder / "classifier" / name) as temporary:
            temporary.write_bytes(page)
    with timed("train"), (folder / "progress.jsonl").open("w", encoding="utf-8") as log:
        records = []
        for record in map(finite, train(run, phase)):
            records.append(record)
            print(json.dumps(rounded(record)), file=log, flush=True)
        run.policy.controls[run.name].save(folder / "control")
    with timed("sample"):
        evaluation = run.evaluate(config.evaluation.paths, phase)
        others = [config.steps // 2, config.steps, 2 * config.steps]
        other_steps = [k for k in others if k > 0 and fits(job.prior, config, k)]
        sweep = run.sweep(STRENGTHS, other_steps, config.evaluation.sweep_paths, phase)
        pair = run.conditions.all(1)
        labels, cond = run.conditions.of(pair)
        write_imagefolder(folder / "samples", labelled(run, run.sample(labels[run.name], **cond), labels, cond))
    kept = {"stage": records[-1]["stage"], "update": records[-1]["update"], "averaged": "averaged" in records[-1]}
    stages = [record for record in records[:-1] if "averaged" in record or "stopped" in record]
    metrics = {
        "accuracy_by": run.accuracy_by,
        **evaluation.metrics(),
        "training": {"kept": kept, "stages": stages},
        "sweep": sweep_metrics(sweep, evaluation),
        "classifier": judges.metrics(),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "versions": {"python": python_version(), **{name: version(name) for name in PACKAGES}},
    }
    command = command or shlex.join(["ctrl", "train", "--config", "config.yaml", "--out", str(folder)])
    write_json(folder / "metrics.json", metrics)
    write_report(folder, run, metrics, evaluation, sweep, records, command)
    return metrics


def sweep_metrics(sweep: dict[str, dict[float, Score]], evaluation: Evaluation) -> dict[str, list[dict]]:
    """The sweep by the names metrics.json uses."""
    return {
        kind: [
            {
                kind: value,
                "accuracy": score.accuracy,
                "accuracy_stderr": score.accuracy_stderr,
                "class_accuracy": score.class_accuracy,
                "diversity_ratio": evaluation.diversity_ratio(score),
            }
            for value, score in scores.items()
        ]
        for kind, scores in sweep.items()
    }


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the figures that are no numbers: JSON has no word for them."""
    return {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}


def learner_of(run: Run, stage: str, phase: Phase) -> Learner:
    """The learner of a stage with the run's settings."""
    config, times = run.config, run.times
    if stage == "weighted":
        cache = run.prior_samples(config.weighted.cache, "prior samples to learn from", phase)
        return Weighted(cache, times, config.weighted.batch)
    if stage == "adjoint":
        a = config.adjoint
        return Adjoint(times, a.batch, regressed=a.regressed, reuse=a.reuse, clip=a.clip, lean=a.lean)
    if stage == "ppo":
        p = config.ppo
        return PPO(times, p.batch, surrogates=p.surrogates, reuse=p.reuse, clip=p.clip)
    return Backprop(times, config.backprop.batch, clip=config.backprop.clip, through=config.backprop.through)


def train(run: Run, phase: Phase = silent) -> Iterator[dict[str, Any]]:
    """Run the learners one after the other; yields a record of every update and probe.

    The best control of all probes is kept; the last record is that probe's, marked as kept.
    """
    few = -(-64 // run.conditions.groups)
    prior_table(run.reward, run.conditions, run.prior_samples(few, "rewards"))  # refused if one is not finite
    best, untrained = Best(run.policy), run.policy.snapshot()
    for stage in run.config.learners:
        settings, learner = getattr(run.config, stage), learner_of(run, stage, phase)
        if isinstance(learner, Weighted) and settings.renoising:
            start = run.policy.snapshot()
            run.policy.restore(untrained)
            even = replace(learner, even=True)
            yield from train_stage(run, RENOISING, even, settings, settings.renoising, phase)
            learner.renoising = run.policy.snapshot()
            run.policy.restore(start)
        yield from train_stage(run, stage, learner, settings, settings.updates, phase, best)
        best.restore()
        phase(f"kept: {best.record['stage']} {best.record['update']}, J {best.record['J']:.2f}", 1)(1)
    yield {**best.record, "kept": True}


@dataclass
class Best:
    """The best control so far, by J on the probes' paths, which share their noise.

    What lies within the noise of a probe should cost neither accuracy nor the averaging of weights, so one standard
    error of the paired difference decides, in the spirit of Breiman et al. 1984: averaged weights may have a J lower by
    less than that, and a control that earns less reward by more must have a J higher by more than that, and by no less
    than the reward it gave up, within its error: J alone would sell most of a control's reward for as much KL.
    """

    policy: Policy
    first: float | None = None
    record: dict[str, Any] = field(default_factory=dict)
    log_w: Tensor | None = None
    earned: Tensor | None = None
    snapshot: list[Tensor] = field(default_factory=list)

    def see(self, record: dict[str, Any], log_w: Tensor, earned: Tensor) -> bool:
        """Whether a probe is the best one so far; log w and reward (n,) are of its paths."""
        if self.first is None:
            self.first = record["J"]
        else:
            gain, error = paired(log_w - self.log_w)
            reward, reward_error = paired(earned - self.earned)
            loses = reward < -reward_error
            needed = max(error, -reward - reward_error) if loses else -error if "averaged" in record else 0.0
            if not gain > needed:  # a J that is no number is not better
                return False
        self.record, self.log_w, self.earned, self.snapshot = record, log_w, earned, self.policy.snapshot()
        return True

    @property
    def improved(self) -> bool:
        """Whether any control is better than the first one seen."""
        return self.first is not None and self.record["J"] > self.first

    def reason_to_stop(self, record: dict[str, Any], idle: int, patience: int | None) -> str | None:
        """Why a learner should stop after a probe, `idle` probes in turn not having been the best; None to go on.

        The warm start may pay many nats before the next learner wins them back: it is never said to diverge.
        """
        if record["stage"] != "weighted" and not record["J"] >= self.first - abs(self.first) - COLLAPSE:
            return f"diverged: J fell to {record['J']:.1f} from the {self.first:.1f} training began with"
        return f"no better control in {idle} probes" if patience and idle >= patience else None

    def restore(self) -> None:
        """Give the policy the best control back."""
        self.policy.restore(self.snapshot)


def paired(difference: Tensor) -> tuple[float, float]:
    """Mean of differences (n,) and its standard error."""
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def train_stage(
    run: Run,
    stage: str,
    learner: Learner,
    settings: LearnerSettings,
    updates: int,
    phase: Phase,
    best: Best | None = None,
) -> Iterator[dict[str, Any]]:
    """One learner from the policy as it is to averaged weights; a record of every update and probe.

    It stops early when the patience is at an end, when a loss or gradient is not finite, and when J falls far below
    what training began with; the last record then says why it `stopped`, and `best` has what is worth keeping.
    Without `best` nobody compares the probes, only the last is taken, and a loss that is not finite is an error.
    """
    config, few = run.config, -(-160 // run.conditions.pairs)
    steps = learner(run.policy, run.reward, run.conditions, stream(config.seed, stage))
    lr = {"embedding": settings.lr_embedding, "adapter": settings.lr_adapter}
    every = max(1, updates // config.evaluation.probes) if best else updates
    advance, note, idle = phase(f"learner: {stage}", updates), "", 0

    def probed(record: dict[str, Any]) -> dict[str, Any]:
        nonlocal idle
        figures, log_w, earned = run.probe(few)
        record = {**record, **figures}
        if best:
            idle = 0 if best.see(record, log_w, earned) else idle + 1
        return record

    record = {"stage": stage, "update": 0}
    if best:
        yield probed(record)
    try:
        for update in fit(run.policy, steps, updates, lr, config.ema_decay):
            record = {"stage": stage, "update": update.number, "loss": update.loss, "grad_norm": update.gradient_norm}
            record |= update.metrics
            if update.number % every == 0 and update.number < updates:
                record = probed(record)
                note = f"J {record['J']:.1f} KL {record['probe_kl']:.1f}"
                if best and (reason := best.reason_to_stop(record, idle, config.patience)):
                    yield {**record, "stopped": reason}
                    return
            advance(1, note)
            yield record
    except FloatingPointError as error:
        if best is None or not best.improved:
            raise
        yield {"stage": stage, "update": record["update"], "stopped": f"diverged: {error}"}
        return
    yield probed({"stage": stage, "update": updates, "averaged": True})


def labelled(run: Run, x_0: Tensor, labels: dict[str, Tensor], cond: dict[str, Tensor]) -> LabelledImages:
    """Samples with the labels they were asked for; a null label is blank."""
    # class −1 picks the last name, the blank
    values = {run.name: (*run.values, "")}
    if not cond:
        return LabelledImages(x_0, labels, values)
    column = run.config.condition or "c"
    return LabelledImages(x_0, {column: cond["c"], **labels}, {column: run.prior.class_names, **values})


def parse_setting(run: Run, settings: list[str]) -> int:
    """The class asked for by `--set CONTROL=VALUE` settings, NULL if none.

    Raises:
        ValueError: not of that form, an unknown control or value.
    """
    chosen = NULL
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in run.policy.controls:
            raise ValueError(
                f"--set {setting}: unknown control {name!r}; this run has: {', '.join(run.policy.controls)}."
            )
        if value not in run.values:
            raise ValueError(f"--set {setting}: {name} must be one of {', '.join(run.values)}, got {value!r}.")
        chosen = run.values.index(value)
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
    y, cond = torch.full((n,), parse_setting(run, settings)), {}
    if exact and not settings:
        raise ValueError("--exact weighs paths by the label asked for. Give one with --set, or leave --exact out.")
    if c is not None and run.prior.classes is None:
        raise ValueError(f"--class {c}: this prior is unconditional. Leave --class out.")
    if c is not None and c not in run.prior.names:
        some = ", ".join(list(run.prior.names)[:10])
        raise ValueError(f"--class must be one of the prior's {run.prior.classes} classes ({some} …), got {c!r}.")
    if run.prior.classes is not None:
        classes = torch.tensor(run.config.classes)
        cond["c"] = classes[torch.arange(n) % len(classes)] if c is None else torch.full((n,), run.prior.names[c])
    check_room(out, SAMPLE_FILES[-1], overwrite)
    generator = torch.Generator().manual_seed(seed)
    x_0 = run.sample(y, strength=strength, steps=steps, generator=generator, exact=exact, phase=phase, **cond)
    clear(out, SAMPLE_FILES)
    write_imagefolder(out, labelled(run, x_0, {run.name: y}, cond))
    save_figure(out / "grid.png", sheet_figure(x_0))
    asked = {
        "set": settings,
        "class": c,
        "n": n,
        "strength": strength,
        "steps": steps or run.config.steps,
        "seed": seed,
        "exact": exact,
    }
    write_json(out / "sample.json", asked)


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
    clear(out, EXACT_FILES[1:])
    rows: list[dict[str, Any]] = []
    pictures = []
    write_json(out / EXACT_FILES[0], {"rows": rows})
    for row, picture in races(quick, seed, phase):
        rows.append(row)
        pictures += [picture] if picture else []
        write_json(out / EXACT_FILES[0], {"rows": rows})
    write_exact_report(out, rows, pictures, command or "ctrl exact", version("ctrl-diffusion"))
    return rows
