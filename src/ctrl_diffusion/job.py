"""The jobs behind the commands: from labelled images to p̂, and from a prior and p̂ to a certified control."""

import json
import math
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sklearn.metrics import r2_score
from torch import Tensor

from . import demo, ranks
from .bias import biases
from .checkpoint import Checkpoints, in_turn, numbered, part_of
from .conditions import Conditions
from .config import (
    ClassifierSettings,
    Config,
    ControlSettings,
    LearnerSettings,
    check_code,
    listed,
    merged,
    suggested,
    with_paths,
)
from .control import NULL, Policy
from .data import LabelledImages, write_imagefolder
from .evaluate import Evaluation, Score
from .files import check_room, check_writable, clear, clear_unfinished, locked, rounded, write_json, write_text, writing
from .independence import dependence
from .judges import Judges, fit_judges
from .learn import Learner
from .learn.adjoint import Adjoint
from .learn.backprop import Backprop
from .learn.ppo import PPO
from .learn.weighted import RENOISING, Weighted
from .pretrained import Prior
from .progress import Interrupted, Phase, silent
from .reading import in_order, read_images
from .report import (
    save_figure,
    sheet_figure,
    write_bias_report,
    write_classifier_report,
    write_exact_report,
    write_report,
)
from .reward import prior_table
from .run import Run, as_set, home, open_prior
from .sample import stream
from .scale import number_at
from .sources import open_table
from .testbed import Picture, races
from .train import fit

CHECKPOINT, BEGUN = "checkpoint", "run.json"
# what each job writes; the last tells its folder from anybody else's
PAGES = ("reliability.png", "confusion.png", "report.html")
CLASSIFIER_FILES = ("judge", "reader", *PAGES, "support.safetensors", "classifier.safetensors", "classifier.json")
RESULTS = (
    "control", "samples", "metrics.json", "report.html", "grid.png", "curves.png", "accuracy.png", "confusion.png",
    "reliability*.png", "sweep.png", "plane.png",
)  # fmt: skip
# the settings go first: with them in its folder a run can be gone on with
RUN_FILES = ("config.yaml", CHECKPOINT, "classifier", *RESULTS, "progress.jsonl")
DATA_FOLDERS = ("data", "judge_data")  # of a demo
SAMPLE_FILES = ("metadata.csv", "[0-9][0-9][0-9][0-9][0-9].png", "grid.png", "sample.json")
EXACT_FILES = ("exact.json", "report.html", "density.png", "gap.png", "growth.png")
BIAS_FILES = ("bias.json", "report.html", "bias.png")
MOST_CONDITIONS = 20
MOST_PROMPTS = 64
PACKAGES = ("ctrl-diffusion", "torch", "diffusers", "peft", "accelerate", "scikit-learn")
COLLAPSE = 10.0  # nats
# what a run with one control more has of the old one
KEPT = {
    "prior", "unconditional", "prompts", "guidance", "negative_prompt", "size", "classes", "gamma", "steps",
    "sigma_end", "time_power", "mixed_precision", "vae_tiling",
}  # fmt: skip
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)


def read_data(
    source: str,
    settings: ControlSettings,
    prior: Prior | None,
    values: tuple[str, ...] | None = None,
    condition: bool = True,
    phase: Phase = silent,
) -> LabelledImages:
    """A dataset as a job needs it: at the prior's size, classes of c numbered as the prior numbers them.

    Args:
        source: of the data.
        settings: of the control.
        prior: None takes the images as they are.
        values: the classes or levels p̂ knows, None for those that occur.
        condition: whether c is read, if it has a column.
        phase: told of progress.

    Raises:
        ValueError: the data are not as they should be, or the prior has no condition.
    """
    name, c = settings.name, settings.condition if condition else None
    if c and prior and prior.classes is None and not prior.text:
        raise ValueError(f"--condition {c}: this prior is unconditional. Leave --condition out.")
    if c == name:
        raise ValueError(f"--condition and --control both name the column {name!r}.")
    columns = {name: values and {value: i for i, value in enumerate(values)}}
    if c:
        columns[c] = (prior and prior.names) or None
    mapping = {key: column for key, column in ((name, settings.column), (c, settings.condition_column)) if column}
    scales = {} if settings.kind == "auto" else {name: settings.kind == "scale"}
    return read_images(
        source, columns, prior and prior.image_shape, mapping, scales | ({c: False} if c else {}),
        {name: settings.tag} if settings.tag else None, settings.skip_bad, phase,
    )  # fmt: skip


def warn_of_copies(source: str, data: LabelledImages, judge_data: LabelledImages | None = None) -> None:
    """Say if pictures stand in two rows, or in what the judge is fitted on too, whatever their files are called.

    Warns:
        UserWarning: they do.
    """
    digests = data.digests()
    first: dict[bytes, int] = {}
    copies = [(first[d], row) for row, d in enumerate(digests, start=1) if first.setdefault(d, row) != row]
    if copies:
        warnings.warn(
            f"{source}: {len(copies)} of {len(data)} images are copies of another (the first: rows {copies[0][0]} and "
            f"{copies[0][1]} of those read). In two parts of a split they make p̂ look better than it is: keep one.",
            stacklevel=2,
        )
    if judge_data and (shared := len(set(judge_data.digests()) & set(digests))):
        warnings.warn(
            f"{source}: {shared} of its images are in judge_data too. A judge that learned from the same images as p̂ "
            "is no second opinion: leave them out of one.",
            stacklevel=2,
        )


def only(data: LabelledImages, condition: str, classes: list[int]) -> LabelledImages:
    """The rows whose condition is one of `classes`, its labels counted within them, as a reader needs them."""
    rows, numbers = (data.labels[condition][:, None] == torch.tensor(classes)).nonzero(as_tuple=True)
    data = data[rows]
    values = tuple(data.values[condition][c] for c in classes)
    return LabelledImages(data.x, {**data.labels, condition: numbers}, {**data.values, condition: values})


def classifier_job(
    source: str | Path,
    control: str,
    condition: str | None,
    out: Path,
    prior: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    skip_bad: bool = False,
    phase: Phase = silent,
    settings: ClassifierSettings | None = None,
    size: tuple[int, int] | None = None,
) -> Judges:
    """Fit p̂, the judge, and the reader of a condition on an imagefolder, and report them.

    Args:
        source: of the data (`sources`).
        control, condition: names of y and c, each NAME or NAME:COLUMN; y also NAME:MODULE:FUNCTION, a rule.
        out: the folder to write.
        prior: a pipeline folder, at whose size the images are read; None takes them as they are.
        seed: of the parts and the fits.
        overwrite: whether an earlier classifier in `out` may go.
        skip_bad: leave out rows that cannot be used, and say how many.
        phase: told of progress.
        settings: of the classifiers.
        size: (height, width) of the prior's images, of one that makes any.

    Raises:
        ValueError: the data or the folder are not as they should be, or p̂ is no better than chance.
    """
    check_room(out, CLASSIFIER_FILES[-1], overwrite)
    if size is not None and not (isinstance(size, (list, tuple)) and [type(side) for side in size] == [int, int]):
        raise ValueError(f"size must be [height, width], got {size!r}.")
    if size and not prior:
        raise ValueError("size is that of a prior's images. Give --prior, or leave size out.")
    about = ControlSettings(name=control, data=str(source), condition=condition, skip_bad=skip_bad)
    control, condition = about.name, about.condition
    model = open_prior(prior, size).placed() if prior else None
    data = read_data(about.data, about, model, phase=phase)
    warn_of_copies(about.data, data)
    if condition:
        data = only(data, condition, data.labels[condition].unique().tolist())
    judges, held_out = fit_judges(
        data, control, condition, settings=settings, seed=seed, phase=phase, encode=encoder_of(model),
        device=model.denoiser.device if model else "cpu",
    )  # fmt: skip
    clear(out, CLASSIFIER_FILES)
    judges.save(out)
    write_classifier_report(out, judges, held_out)
    return judges


def encoder_of(prior: Prior | None) -> Callable[[Tensor], Tensor] | None:
    """What makes latents of images, if the prior has it."""
    return prior.encode if prior and prior.codec else None


@dataclass
class Material:
    """What one control is made from.

    Args:
        settings: of the control.
        data, judge_data: as read; no data where the control is settled.
        judges: as read, None if they are to be fitted.
        pages: of the classifier that was handed over, by name.
    """

    settings: ControlSettings
    data: LabelledImages | None
    judges: Judges | None
    pages: dict[str, bytes]
    judge_data: LabelledImages | None = None


@dataclass
class Job:
    """A training that is ready to start: everything that can be refused has been looked at.

    Args:
        config: whole.
        prior: as read.
        materials: of every control.
    """

    config: Config
    prior: Prior
    materials: list[Material]


def prepare(given: dict[str, Any], phase: Phase = silent, trust: bool = False) -> Job:
    """Read prior, data and classifiers; fill in the settings that depend on them.

    Args:
        given: settings by the names of `Config`, of which prior, data and control must be there.
        phase: told of progress.
        trust: run code that a classifier's folder names.

    Raises:
        ValueError: whatever is wrong with them.
    """
    for name in ("prior", *(() if given.get("controls") else ("data", "control"))):
        if not given.get(name):
            raise ValueError(f"--{name} is missing. Give it, or a --config that has it.")
    given = with_paths(listed(given), lambda name: str(Path(name).resolve()))
    if isinstance(given.get("prompts"), str):
        given["prompts"] = read_prompts(Path(given["prompts"]))
    wanted = Config.of(given)  # mistakes in the settings come before mistakes in the files
    prior = open_prior(wanted.prior, wanted.size)
    if prior.text and wanted.prompts is None:
        wanted.prompts = prompts_of(wanted.controls)
    prior = as_set(prior, wanted)
    materials = [material(settings, prior, phase, trust) for settings in wanted.controls]
    known = next((m for m in materials if m.data and m.settings.condition), None)
    classes = wanted.classes or conditions_of(prior, known.data if known else None, known and known.settings.condition)
    check_classes(prior, classes)
    for one in materials:
        keep_classes(one, classes)
    sizes = {m.settings.name: len(m.judges.values if m.judges else m.data.values[m.settings.name]) for m in materials}
    settled = [m.settings.name for m in materials if m.settings.settled_from]
    trained = Conditions.trained({}, sizes, settled)
    site, parameters = prior.denoiser.site, sum(p.numel() for p in prior.denoiser.network.parameters())
    groups = len(classes or [0])
    defaults = suggested(prior.denoiser.shape, parameters, site.rank, groups=groups, classes=trained.classes)
    guidance = prior.text.guidance if prior.text and wanted.guidance is None else wanted.guidance
    whole = {"classes": classes, "prompts": wanted.prompts, "guidance": guidance}
    config = Config.of({**merged(defaults, given), **whole})
    for name in config.learners:
        ranks.share_of_batch(getattr(config, name).batch)
    while "steps" not in given and config.steps > 1 and not fits(prior, config, config.steps):
        config.steps -= 1  # a prior of few timesteps
    prior.denoiser.times(config.steps, config.sigma_end, config.time_power)
    if config.evaluation.prior_samples < math.prod(sizes.values()):
        raise ValueError("evaluation.prior_samples must be at least the number of the controls' classes.")
    return Job(config, prior, materials)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; blank lines are left out.

    Raises:
        ValueError: it cannot be read, has none, or more than can be trained one by one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of prompts, one a line: {error}") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise ValueError(f"{path} has no prompts. Write one a line.")
    if len(found) > MOST_PROMPTS:
        raise ValueError(f"{path} has {len(found)} prompts; {MOST_PROMPTS} at most are trained one by one.")
    return found


def prompts_of(controls: list[ControlSettings]) -> list[str]:
    """The prompts that stand in the data's columns of c.

    Raises:
        ValueError: no data have such a column, or more prompts than can be trained one by one.
    """
    known = next((control for control in controls if control.condition), None)
    if known is None:
        raise ValueError(
            "this prior is given text. Name the prompts to train on: --prompts FILE, or the column with --condition."
        )
    table = open_table(known.data)
    column = known.condition_column or known.condition
    table.check_columns([column])
    found = in_order(text for text in table.texts(column) if text)
    if len(found) > MOST_PROMPTS:
        raise ValueError(
            f"{table.name}: {column} has {len(found)} different prompts, more than {MOST_PROMPTS}. If y does not "
            "depend on the prompt, leave --condition out and name some with --prompts FILE."
        )
    return list(found)


def material(settings: ControlSettings, prior: Prior, phase: Phase, trust: bool) -> Material:
    """Read what a control is made from.

    Raises:
        ValueError: whatever is wrong with it.
    """
    if settings.settled_from:
        folder = home(Path(settings.settled_from), "classifier", settings.name)
        return Material(settings, None, Judges.load(folder, trust), pages_of(folder))
    judges, pages, handed = None, {}, settings.classifier_from
    if handed:
        judges, pages = Judges.load(Path(handed), trust), pages_of(Path(handed))
        check_classifier(judges, handed, settings.name, prior)
    values = judges and judges.values
    data = read_data(settings.data, settings, prior, values, phase=phase)
    on_scale = data.on_scale(settings.name)
    if settings.ruler and not on_scale and data.values[settings.name] != demo.VALUES[settings.ruler]:
        raise ValueError(
            f"ruler: {settings.ruler} measures {settings.ruler}, not {settings.name!r}. Leave the ruler out."
        )
    judge_data = None
    if settings.judge_data and not judges:
        known = settings.model_copy(update={"kind": "scale" if on_scale else "classes"})
        judge_data = read_data(
            settings.judge_data, known, prior, data.values[settings.name], settings.classifier.conditional, phase
        )
    warn_of_copies(settings.data, data, judge_data)
    return Material(settings, data, judges, pages, judge_data)


def pages_of(folder: Path) -> dict[str, bytes]:
    """The pages about a classifier, by name."""
    return {name: (folder / name).read_bytes() for name in PAGES}


def keep_classes(one: Material, classes: list[int] | None) -> None:
    """Keep the rows of the classes that are trained, and refuse data or judges that do not do for them."""
    settings, name = one.settings, one.settings.name
    if one.data and classes and settings.condition:
        one.data = only(one.data, settings.condition, classes)
    if one.judge_data:
        if classes and settings.classifier.conditional:
            one.judge_data = only(one.judge_data, settings.condition, classes)
        one.judge_data.check_classes(name)
    if one.data and one.judges:
        check_judges(one.judges, settings.classifier_from, one.data, settings.condition, bool(settings.ruler))
    elif one.data:
        one.data.check_classes(name)


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


def check_classifier(judges: Judges, folder: str, control: str, prior: Prior) -> None:
    """Refuse a classifier of another control, of images of another size, or of latents the prior does not have."""
    shape = prior.image_shape
    if judges.latent and not prior.codec:
        raise ValueError(f"the classifier in {folder} looks at latents, and this prior has none. Fit it with --prior.")
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


def conditions_of(prior: Prior, data: LabelledImages | None, condition: str | None) -> list[int] | None:
    """The prior's classes to train and certify: those in the data, else all, else some evenly spaced."""
    if prior.classes is None:
        return None
    if condition:
        return data.labels[condition].unique().tolist()
    if prior.text:
        return list(range(prior.classes))
    if prior.classes > MOST_CONDITIONS:
        warnings.warn(
            f"the prior has {prior.classes} classes and the data no --condition: {MOST_CONDITIONS} of them, evenly "
            "spaced, are trained and certified. Name others as classes: in a --config.",
            stacklevel=2,
        )
    chosen = torch.linspace(0, prior.classes - 1, min(prior.classes, MOST_CONDITIONS))
    return chosen.round().long().tolist()


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
        raise Interrupted("interrupted before training began: the same command begins again.") from None


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


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long what is done inside took."""
    begin = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - begin, 1)


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
            name, s = one.settings.name, one.settings

            def fitted(one: Material = one, name: str = name, s: ControlSettings = s) -> Judges:
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
        return finished(run, folder, phase)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted. Everything is saved; {again}") from None
    except OSError as error:
        raise OSError(f"{error}. What is saved is whole; {again}") from error


def finished(run: Run, folder: Path, phase: Phase) -> dict[str, Any]:
    """The contents of metrics.json, when all is done that `finish` has to do."""
    config = run.config
    begun = ranks.from_first(lambda: json.loads((folder / CHECKPOINT / BEGUN).read_text(encoding="utf-8")))
    seconds, shared = begun["seconds"], begun["dependence"]
    records, seconds["train"] = train_in(folder, run, phase)
    ranks.from_first(lambda: run.save_controls(folder))
    with timed(seconds, "sample"):
        evaluation = run.evaluate(config.evaluation.paths, phase)
        others = [config.steps // 2, config.steps, 2 * config.steps]
        other_steps = [k for k in others if k > 0 and fits(run.prior, config, k)]
        followed = run.follow(config.evaluation.paths // 2, phase)
        sweep = run.sweep(STRENGTHS, other_steps, config.evaluation.sweep_paths, phase)
        pair = run.conditions.all(1)
        labels, cond = run.conditions.of(pair)
        samples = labelled(run, run.sample(labels, **cond), labels, cond)
        ranks.from_first(lambda: write_imagefolder(folder / "samples", samples))
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
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "versions": {"python": python_version(), **{name: version(name) for name in PACKAGES}},
    }

    def close() -> dict[str, Any]:
        write_json(folder / "metrics.json", metrics)
        write_report(folder, run, metrics, evaluation, sweep, followed, records, begun["command"])
        clear(folder, [f"{CHECKPOINT}/{BEGUN}", CHECKPOINT])
        return metrics

    return ranks.from_first(close)


def is_finished(folder: str | Path) -> bool:
    """Whether a run folder has all that a training leaves."""
    folder = Path(folder)
    return (folder / "report.html").is_file() and not (folder / CHECKPOINT / BEGUN).is_file()


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
        if not has_begun:
            check_code(config.model_dump(), {}, trust, folder / "config.yaml")
            return execute(prepare(config.model_dump(), phase, trust), folder, False, command, phase)
        judges = {name: Judges.load(home(folder, "classifier", name), trust) for name in config.names}
        ranks.from_first(lambda: clear(folder, RESULTS))
        return finish(Run.start(config, as_set(open_prior(config.prior, config.size), config), judges), folder, phase)


@torch.no_grad()
def dependences(materials: list[Material], judges: dict[str, Judges], prior: Prior) -> dict[str, dict[str, float]]:
    """Where two controls were read from one dataset, what their labels say about each other once x is known.

    Warns:
        RuntimeWarning: they do, and adding their rewards is doubtful.
    """
    found = {}
    for one, other in combinations([m for m in materials if m.data and not m.settings.skip_bad], 2):
        names = one.settings.name, other.settings.name
        if one.settings.data != other.settings.data or len(one.data) != len(other.data):
            continue
        if any(m.data.on_scale(m.settings.name) for m in (one, other)):
            continue
        looked = (
            (judges[name], m.data.through(prior.encode) if judges[name].latent else m.data)
            for name, m in zip(names, (one, other), strict=True)
        )
        log_p = tuple(judge.log_prob(data) for judge, data in looked)
        shared = dependence(log_p, (one.data.labels[names[0]], other.data.labels[names[1]]))
        found[" and ".join(names)] = vars(shared)
        if shared.doubtful:
            warnings.warn(
                f"{' and '.join(names)} still depend on each other once x is known (at least {shared.nats:.3f} nats, "
                f"p = {shared.p_value:.1g}): rewards add only if they do not. Make their combinations one control.",
                RuntimeWarning,
                stacklevel=2,
            )
    return found


def classifier_metrics(judges: dict[str, Judges]) -> dict[str, Any]:
    """What is known of p̂ by the names metrics.json uses; of several controls by their names."""
    found = {name: one.metrics() for name, one in judges.items()}
    return found if len(found) > 1 else next(iter(found.values()))


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


def follows(asked: Tensor, came: Tensor) -> dict[str, float]:
    """How samples follow the places (n,) that were asked for, by the names metrics.json uses; in levels."""
    miss = came - asked
    return {
        "samples": len(asked),
        "r2": r2_score(asked.numpy(), came.numpy()),
        "mean_error_levels": float(miss.mean()),
        "root_mean_square_error_levels": float(miss.square().mean().sqrt()),
    }


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the figures that are no numbers: JSON has no word for them."""
    return {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}


def learner_of(run: Run, stage: str, phase: Phase) -> Learner:
    """The learner of a stage with the run's settings."""
    config, times, micro = run.config, run.times, run.config.micro_batch
    if stage == "weighted":
        cache = run.prior_samples(config.weighted.cache, "prior samples to learn from", phase)
        return Weighted(cache, times, config.weighted.batch, micro=micro)
    if stage == "adjoint":
        a = config.adjoint
        return Adjoint(times, a.batch, micro=micro, regressed=a.regressed, reuse=a.reuse, clip=a.clip, lean=a.lean)
    if stage == "ppo":
        p = config.ppo
        return PPO(times, p.batch, micro=micro, surrogates=p.surrogates, reuse=p.reuse, clip=p.clip)
    b = config.backprop
    return Backprop(times, b.batch, micro=micro, clip=b.clip, through=b.through)


def stages_of(config: Config) -> Iterator[tuple[str, str]]:
    """The stages of a training by name, with the learner of each."""
    for learner in config.learners:
        if learner == "weighted" and config.weighted.renoising:
            yield RENOISING, learner
        yield learner, learner


def train(run: Run, phase: Phase = silent, course: "Course | None" = None) -> Iterator[dict[str, Any]]:
    """Run the learners one after the other; yields a record of every update and probe.

    The best control of all probes is kept; the last record is that probe's, marked as kept. A `course` that is not at
    its beginning is gone on with.
    """
    few = -(-64 // run.trained.groups)
    prior_table(run.reward, run.trained, run.prior_samples(few, "rewards"))  # refused if one is not finite
    course = course or Course(Best(run.policy))
    best, untrained, learner = course.best, run.policy.snapshot(), None
    run.policy.restore(best.snapshot or untrained)
    for number, (stage, name) in enumerate(stages_of(run.config)):
        if number < course.done:
            continue
        settings, learner = getattr(run.config, name), learner or learner_of(run, name, phase)
        if stage == RENOISING:
            run.policy.restore(untrained)
            even = replace(learner, even=True)
            yield from train_stage(run, stage, even, settings, settings.renoising, phase, course)
            course.renoising = run.policy.snapshot()
            run.policy.restore(best.snapshot or untrained)
        else:
            if isinstance(learner, Weighted) and settings.renoising:
                learner.renoising = course.renoising
            yield from train_stage(run, stage, learner, settings, settings.updates, phase, course, best)
            learner = None
            best.restore()
            phase(f"kept: {best.record['stage']} {best.record['update']}, J {best.record['J']:.2f}", 1)(1)
        course.pass_on()
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


@dataclass
class Course:
    """Where a training stands, and what it takes to go on from there as if nothing had happened.

    A learner's paths are not kept. A state is taken only where none of them is left to be used: what comes next is
    drawn from the stage's generator, which is kept with what the learner takes along, with the state of `fit` (weights,
    their averages, AdamW's moments, the place in the learning rate's course) and with the best control. All else comes
    out the same again: p̂ is in the run folder, and an untrained control, the prior's samples, probes and certificates
    draw from streams of the seed and their purpose alone.

    Args:
        best: the best control so far.
        checkpoints: where states are saved; None saves none.
        done: stages that are over.
        records: of the log.
        idle: probes in turn that were not the best.
        seconds: training took before this process.
        renoising: the control that learned what re-noising alone does.
        within: of the stage under way, its last state; empty at its start.
        latest: what is to be saved next.
        begin: of this process's training, by its clock.
    """

    best: Best
    checkpoints: Checkpoints | None = None
    done: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    idle: int = 0
    seconds: float = 0.0
    renoising: list[Tensor] = field(default_factory=list)
    within: dict[str, Tensor] = field(default_factory=dict)
    latest: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    begin: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, run: Run, checkpoints: Checkpoints) -> "Course":
        """As the newest state has it, or at the beginning; every rank is where rank 0 is."""
        course = cls(Best(run.policy), checkpoints)
        if found := ranks.from_first(checkpoints.newest):
            tensors, about = found
            best, device = course.best, run.policy.device
            best.first, best.record = about["first"], about["record"]
            best.log_w, best.earned = tensors.get("log_w"), tensors.get("earned")
            best.snapshot, course.renoising = (
                [value.to(device) for value in in_turn(name, tensors)] for name in ("best", "renoising")
            )
            course.within = part_of("within", tensors)
            course.done, course.records, course.idle = about["done"], about["records"], about["idle"]
            course.seconds, run.policy.base.gradient_scale = about["seconds"], about["gradient_scale"]
        return course

    @property
    def elapsed(self) -> float:
        """Seconds of training so far."""
        return self.seconds + time.perf_counter() - self.begin

    def reach(self, within: dict[str, Tensor], due: bool = True) -> None:
        """Take in the state of the stage under way; it is saved if that is due."""
        best, self.within = self.best, within
        tensors = {f"within.{name}": value for name, value in within.items()}
        tensors |= numbered("best", best.snapshot) | numbered("renoising", self.renoising)
        tensors |= {"log_w": best.log_w, "earned": best.earned} if best.snapshot else {}
        about = {"done": self.done, "idle": self.idle, "records": self.records.copy(), "seconds": self.elapsed}
        about |= {"first": best.first, "record": best.record, "gradient_scale": best.policy.gradient_scale}
        self.latest = tensors, about
        if due:
            self.save()

    def pass_on(self) -> None:
        """A stage is over."""
        self.done, self.idle, self.within = self.done + 1, 0, {}
        if self.checkpoints:
            self.reach({})

    def save(self) -> None:
        """Write the last state, if it is not written yet; of several ranks rank 0 does."""
        if self.latest and ranks.is_first():
            self.checkpoints.write(*self.latest)
            self.latest = None


def train_in(folder: Path, run: Run, phase: Phase) -> tuple[list[dict[str, Any]], float]:
    """Train a run from where the checkpoints in its folder stand; the records of its log, and the seconds it took.

    The log is made what it was then. Out of memory, once the micro-batch is halved and training goes on from the last
    state; what is trained does not depend on it, but for rounding. Several ranks are not halved.

    Raises:
        MemoryError: out of memory for all that.

    Warns:
        RuntimeWarning: the micro-batch was halved.
    """
    untrained, log, may_halve = run.policy.snapshot(), folder / RUN_FILES[-1], True
    while True:
        run.policy.restore(untrained)
        course = Course.of(run, Checkpoints(folder / CHECKPOINT))
        past = "".join(map(line_of, course.records))
        ranks.from_first(lambda past=past: write_text(log, past))
        try:
            with log.open("a", encoding="utf-8") if ranks.is_first() else nullcontext() as file:
                for record in map(finite, train(run, phase, course)):
                    course.records.append(record)
                    if file:
                        print(line_of(record), end="", file=file, flush=True)
            return course.records, round(course.elapsed, 1)
        except KeyboardInterrupt:
            course.save()
            raise
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        course.save()
        stage = getattr(run.config, list(stages_of(run.config))[course.done][1])
        at_once = run.config.micro_batch or stage.batch
        if not may_halve or at_once == 1 or ranks.count() > 1:  # other ranks wait where they had memory enough
            raise MemoryError(
                f"out of memory. In {folder}/config.yaml turn down micro_batch (now {at_once}), batch, rank or size, "
                f"or set mixed_precision: bf16. Then go on with: ctrl train --resume {folder}"
            )
        may_halve, run.config.micro_batch = False, at_once // 2
        run.config.write(folder / "config.yaml")
        torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory: training goes on with micro_batch {at_once // 2} instead of {at_once}; updates see as "
            "many samples as before.",
            RuntimeWarning,
            stacklevel=2,
        )


def line_of(record: dict[str, Any]) -> str:
    """A record as the log has it."""
    return json.dumps(rounded(record)) + "\n"


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is an allocator's, of an accelerator or the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def train_stage(
    run: Run,
    stage: str,
    learner: Learner,
    settings: LearnerSettings,
    updates: int,
    phase: Phase,
    course: Course,
    best: Best | None = None,
) -> Iterator[dict[str, Any]]:
    """One learner from the policy as it is to averaged weights; a record of every update and probe.

    It stops early when the patience is at an end, when too many updates in turn are not finite, and when J falls far
    below what training began with; the last record then says why it `stopped`, and `best` has what is worth keeping.
    Without `best` nobody compares the probes, only the last is taken, and not to be finite is an error.
    """
    config, few, begin = run.config, -(-160 // run.trained.pairs), part_of("fit", course.within)
    generator = stream(config.seed, stage)
    if begin:
        generator.set_state(course.within["generator"])
    carried = [value.to(run.policy.device) for value in in_turn("carried", course.within)]
    steps = learner(run.policy, run.reward, run.trained, generator, carried)
    lr = {"embedding": settings.lr_embedding, "adapter": settings.lr_adapter}
    every = max(1, updates // config.evaluation.probes) if best else updates
    advance, note, skipped, due = phase(f"learner: {stage}", updates), "", {}, False

    def probed(record: dict[str, Any]) -> dict[str, Any]:
        figures, log_w, earned = run.probe(few)
        record = {**record, **figures}
        if best:
            course.idle = 0 if best.see(record, log_w, earned) else course.idle + 1
        return record

    record = {"stage": stage, "update": int(begin["counts"][0]) if begin else 0}
    advance(record["update"])
    taken = saved = record["update"]
    if best and not begin:
        yield probed(record)
    try:
        for update in fit(
            run.policy, steps, updates, lr, config.ema_decay, max_skipped=config.max_skipped, begin=begin
        ):
            record = {"stage": stage, "update": update.number, "loss": update.loss, "grad_norm": update.gradient_norm}
            skipped = {"skipped": update.skipped} if update.skipped else {}
            record |= {**update.metrics, **skipped}
            if update.number % every == 0 and update.number < updates:
                record = probed(record)
                note = f"J {record['J']:.1f} KL {record['probe_kl']:.1f}"
                if best and (reason := best.reason_to_stop(record, course.idle, config.patience)):
                    yield {**record, "stopped": reason}
                    return
            advance(1, note)
            yield record
            due = due or "J" in record or update.number - saved >= config.checkpoint
            if update.state and course.checkpoints and (due or update.number - taken >= config.checkpoint // 10):
                here = {f"fit.{name}": value for name, value in update.state().items()}
                here |= {"generator": generator.get_state(), **numbered("carried", ranks.joined(carried))}
                course.reach(here, due)
                taken, saved, due = update.number, update.number if due else saved, False
    except FloatingPointError as error:
        if best is None or not best.improved:
            raise
        yield {"stage": stage, "update": record["update"], "stopped": f"diverged: {error}", **skipped}
        return
    yield probed({"stage": stage, "update": updates, "averaged": True, **skipped})


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
