"""What a training is made from, read and looked at before it starts: whatever can be refused is refused here."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..control.conditions import Conditions
from ..data.digits import VALUES
from ..data.labelled import LabelledImages
from ..data.read import in_order, read_images
from ..data.tables import open_table
from ..prior.prior import Prior, open_prior
from ..reward.independence import dependence
from ..reward.panel import Panel
from ..system import ranks
from ..system.progress import DEFAULT, JobOptions, Phase, silent
from ..system.strict import merged
from ..system.tracking import check_trackers
from .config import Config, ControlSettings, check_present, list_controls, map_paths
from .defaults import suggested
from .folder import RunFolder, read_pages
from .run import configured, fits

MOST_CONDITIONS = 20
MOST_PROMPTS = 64


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


def encoder_of(prior: Prior | None) -> Callable[[Tensor], Tensor] | None:
    """What makes latents of images, if the prior has it."""
    return prior.encode if prior and prior.latent else None


@dataclass
class ControlInputs:
    """What one control is made from.

    Args:
        settings: of the control.
        data, judge_data: as read; no data where the control is settled.
        panel: as read, None if they are to be fitted.
        pages: of the classifier that was handed over, by name.
    """

    settings: ControlSettings
    data: LabelledImages | None
    panel: Panel | None
    pages: dict[str, bytes]
    judge_data: LabelledImages | None = None


@dataclass
class PreparedTraining:
    """A training that is ready to start: everything that can be refused has been looked at.

    Args:
        config: whole.
        prior: as read.
        materials: of every control.
    """

    config: Config
    prior: Prior
    materials: list[ControlInputs]


def prepare(given: dict[str, Any], options: JobOptions = DEFAULT) -> PreparedTraining:
    """Read prior, data and classifiers; fill in the settings that depend on them.

    Args:
        given: settings by the names of `Config`, of which prior, data and control must be there.
        options: progress and trust.

    Raises:
        ValueError: whatever is wrong with them.
    """
    given = list_controls(given)
    check_present(given, "prior")
    given = map_paths(given, lambda name: str(Path(name).resolve()))
    if isinstance(given.get("prompts"), str):
        given["prompts"] = read_prompts(Path(given["prompts"]))
    wanted = Config.from_values(given)  # mistakes in the settings come before mistakes in the files
    check_trackers(wanted.track)
    prior = open_prior(wanted.prior, wanted.size)
    if prior.text and wanted.prompts is None:
        wanted = wanted.with_(prompts=prompts_of(wanted.controls))
    prior = configured(prior, wanted)
    materials = [material(settings, prior, options) for settings in wanted.controls]
    known = next((m for m in materials if m.data and m.settings.condition), None)
    classes = wanted.classes or conditions_of(prior, known.data if known else None, known and known.settings.condition)
    check_classes(prior, classes)
    for one in materials:
        keep_classes(one, classes)
    sizes = {m.settings.name: len(m.panel.values if m.panel else m.data.values[m.settings.name]) for m in materials}
    settled = [m.settings.name for m in materials if m.settings.settled_from]
    trained = Conditions.for_training({}, sizes, settled)
    site, parameters = prior.denoiser.site, sum(p.numel() for p in prior.denoiser.network.parameters())
    groups = len(classes or [0])
    defaults = suggested(prior.denoiser.shape, parameters, site.rank, groups=groups, classes=trained.classes)
    guidance = prior.text.guidance if prior.text and wanted.guidance is None else wanted.guidance
    whole = {"classes": classes, "prompts": wanted.prompts, "guidance": guidance}
    config = Config.from_values({**merged(defaults, given), **whole})
    check_batches(config)
    if "steps" not in given:  # the prior may have fewer timesteps
        config = config.with_(steps=next(k for k in range(config.steps, 0, -1) if k == 1 or fits(prior, config, k)))
    prior.denoiser.times(config.steps, config.sigma_end, config.time_power)
    if config.evaluation.prior_samples < math.prod(sizes.values()):
        raise ValueError("evaluation.prior_samples must be at least the number of the controls' classes.")
    return PreparedTraining(config, prior, materials)


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


def material(settings: ControlSettings, prior: Prior | None, options: JobOptions = DEFAULT) -> ControlInputs:
    """Read what a control is made from; without a prior the images as they are.

    Raises:
        ValueError: whatever is wrong with it.
    """
    if settings.settled_from:
        folder = RunFolder(settings.settled_from).classifier(settings.name)
        return ControlInputs(settings, None, Panel.load(folder, options.trust), read_pages(folder))
    panel, pages, handed = None, {}, settings.classifier_from
    if handed:
        panel, pages = Panel.load(Path(handed), options.trust), read_pages(Path(handed))
        check_classifier(panel, handed, settings.name, prior)
    values = panel and panel.values
    data = read_data(settings.data, settings, prior, values, phase=options.phase)
    space = data.space(settings.name)
    if settings.ruler and not space.scale and space.values != VALUES[settings.ruler]:
        raise ValueError(
            f"ruler: {settings.ruler} measures {settings.ruler}, not {settings.name!r}. Leave the ruler out."
        )
    judge_data = None
    if settings.judge_data and not panel:
        known = settings.model_copy(update={"kind": "scale" if space.scale else "classes"})
        conditional, phase = settings.classifier.conditional, options.phase
        judge_data = read_data(settings.judge_data, known, prior, space.values, conditional, phase)
    warn_of_copies(settings.data, data, judge_data)
    return ControlInputs(settings, data, panel, pages, judge_data)


def keep_classes(one: ControlInputs, classes: list[int] | None) -> None:
    """Keep the rows of the classes that are trained, and refuse data or panel that do not do for them."""
    settings, name = one.settings, one.settings.name
    if one.data and classes and settings.condition:
        one.data = only(one.data, settings.condition, classes)
    if one.judge_data:
        if classes and settings.classifier.conditional:
            one.judge_data = only(one.judge_data, settings.condition, classes)
        one.judge_data.check_classes(name)
    if one.data and one.panel:
        check_panel(one.panel, settings.classifier_from, one.data, settings.condition, bool(settings.ruler))
    elif one.data:
        one.data.check_classes(name)


def check_batches(config: Config) -> None:
    """Refuse batches that the processes cannot share, or not evenly where they must.

    Raises:
        ValueError: whose.
    """
    for name in config.learners:
        try:
            ranks.rank_rows(getattr(config, name).batch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def check_classes(prior: Prior, classes: list[int] | None) -> None:
    """Refuse `classes` that are not the prior's."""
    known = range(prior.classes or 0)
    if classes and (len(set(classes)) < len(classes) or not set(classes) <= set(known)):
        what = f"different numbers in 0 … {known[-1]}" if known else "null: this prior is unconditional"
        raise ValueError(f"classes must be {what}; got {classes}.")


def check_classifier(panel: Panel, folder: str, control: str, prior: Prior) -> None:
    """Refuse a classifier of another control, of images of another size, or of latents the prior does not have."""
    shape = prior.image_shape
    if panel.latent and not prior.latent:
        raise ValueError(f"the classifier in {folder} looks at latents, and this prior has none. Fit it with --prior.")
    if panel.control != control or panel.shape != shape:
        raise ValueError(
            f"the classifier in {folder} is of {panel.control!r} on images of {panel.shape}; needed: {control!r} on "
            f"{shape}. Fit it with ctrl classifier --prior."
        )


def check_panel(panel: Panel, folder: str, data: LabelledImages, condition: str | None, ruler: bool) -> None:
    """Refuse a classifier that lacks its judge, or reads other classes; a reader nobody asked for is left aside."""
    if panel.judge is None and not ruler:
        raise ValueError(f"the classifier in {folder} has no judge. Fit it with ctrl classifier.")
    if condition is None and panel.classifier.conditional:
        raise ValueError(f"the classifier in {folder} is p̂(y | x, c). Name the column of c with --condition.")
    if condition is None:
        panel.reader = panel.reader_accuracy = None
    elif (panel.condition, panel.condition_values) != (condition, data.values[condition]):
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


@torch.no_grad()
def dependences(materials: list[ControlInputs], panels: dict[str, Panel], prior: Prior) -> dict[str, dict[str, float]]:
    """Where two controls were read from one dataset, what their labels say about each other once x is known.

    Warns:
        RuntimeWarning: they do, and adding their rewards is doubtful.
    """
    found = {}
    for one, other in combinations([m for m in materials if m.data and not m.settings.skip_bad], 2):
        names = one.settings.name, other.settings.name
        if one.settings.data != other.settings.data or len(one.data) != len(other.data):
            continue
        if any(m.data.space(m.settings.name).scale for m in (one, other)):
            continue
        looked = (
            (panels[name], m.data.through(prior.encode) if panels[name].latent else m.data)
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
