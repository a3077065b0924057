"""Read what a training is made from and choose its settings; refuse whatever can be refused before it starts."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chain.noise import stream
from ..control.conditions import MOST_ENUMERATED, Conditions, ConditionSplit
from ..data.images import Levels
from ..data.labelled import LabelledImages, warn_of_copies
from ..data.names import in_order, is_missing
from ..data.read import read_images
from ..data.sources import open_table
from ..evaluate.rulers.table import RULERS
from ..prior.prior import Prior, open_prior
from ..prior.text.prompt_file import beyond_windows, check_lines, read_prompt_file
from ..reward.classifiers import unreadable
from ..reward.independence import dependence
from ..reward.panel import Panel
from ..system import ranks
from ..system.files import some_of
from ..system.progress import DEFAULT, JobOptions, Phase, silent
from ..system.strict import merged
from ..system.tracking import check_trackers
from .config import Config, ControlSettings, check_present, list_controls, map_paths
from .defaults import limited, suggested
from .folder import PROMPTS, RunFolder, read_pages
from .run import configured, fits, times_of

HELD_OUT = 10  # of a population one in so many conditions is held out, unless its config says how many


@dataclass
class ControlInputs:
    """Hold what one control is made from."""

    settings: ControlSettings
    data: LabelledImages | None  # None for a control that was trained in another run
    panel: Panel | None  # None if it is to be fitted
    pages: dict[str, bytes]  # of the panel's report, by file name
    judge_data: LabelledImages | None = None
    unread: str | None = None  # why c gets no reader, though the data say c; None if it gets one

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def classes(self) -> int:
        return len(self.panel.values if self.panel else self.data.values[self.name])

    def report(self, say: Callable[[str], None]) -> None:
        """Say what was read, in one line for each dataset, and whether c is not read back."""
        for data in (self.data, self.judge_data):
            if data and data.about:
                say(data.about)
        if self.unread:
            say(self.unread)


@dataclass
class PreparedTraining:
    """Hold a training that is ready to start."""

    config: Config  # with every key chosen
    prior: Prior  # with the prompts, device and precision of the config
    inputs: list[ControlInputs]
    prompts: list[str] | None = None  # of a prior that is given text
    cut: bool = False  # whether a learner has fewer updates than by default


def prepare(
    values: dict[str, Any], options: JobOptions = DEFAULT, usual: dict[str, Any] | None = None,
    beside: Path | None = None,
) -> PreparedTraining:  # fmt: skip
    """Read prior, data and classifiers, and choose the settings that depend on them; refuse what is wrong with any.

    A training with fewer updates than by default counts as cut short; `usual` settings, if given, say other defaults.
    Many prompts are encoded into a folder in `beside` (see `configured`).
    """
    values = list_controls(values)
    check_present(values, "prior")
    values = map_paths(values, lambda name: str(Path(name).resolve()))
    config = Config.from_values(values)  # wrong settings are reported before wrong files
    check_trackers(config.track)
    file = read_prompt_file(Path(config.prompts)) if isinstance(config.prompts, str) else None
    prompts = file.prompts if file else config.prompts
    prior = open_prior(config.prior, config.size)
    if prior.text and prompts is None:
        prompts = prompts_of(config.controls)
    if not file and len(prompts or ()) > MOST_ENUMERATED:
        check_lines(prompts)
    notes = [file.about] if file else []
    if prior.text:
        notes += beyond_windows(prior.text.encoders, prompts, file and file.lines)
    kept = config.prompts if file else PROMPTS  # a run keeps its prompts in a file, unless they are few
    config = config.with_(prompts=prompts if len(prompts or ()) <= MOST_ENUMERATED else kept)
    prior = configured(prior, config, prompts, beside)
    inputs = [read_inputs(settings, prior, options) for settings in config.controls]
    known, split = known_classes(config, prior, inputs)
    if config.weights and not (split and split.pooled and len(config.weights) == len(known)):
        what = f"of {len(known or ())} classes" if split and split.pooled else "and no population to draw by them"
        raise ValueError(f"weights: got {len(config.weights)} {what}. Give one for each, or leave them out.")
    inputs = [select_inputs(each, known, prior) for each in inputs]
    config, cut = complete(values, config, prior, inputs, known, split, usual or {})
    for note in notes:  # once nothing is left to refuse
        options.say(note)
    for each in inputs:
        each.report(options.say)
    if split and split.pooled:
        options.say(in_words(split, "prompts" if prior.text else "classes"))
    return PreparedTraining(config, prior, inputs, prompts, cut)


def known_classes(
    config: Config, prior: Prior, inputs: list[ControlInputs]
) -> tuple[Sequence[int] | None, ConditionSplit | None]:
    """Return the prior's classes to train on or hold out, and how they are split; None of an unconditional prior."""
    numbers = range(prior.classes or 0)
    known = numbers if config.classes == "all" and numbers else config.classes
    known = known or classes_to_train(prior, inputs)
    if known and known != numbers and (len(set(known)) < len(known) or not set(known) <= set(numbers)):
        what = f"different numbers in 0 … {numbers[-1]}" if numbers else "null: this prior is unconditional"
        given = config.classes if isinstance(config.classes, str) else some_of([*map(str, known)])
        raise ValueError(f"classes must be {what}; got {given}.")
    if not known:
        if config.hold_out:
            raise ValueError(f"hold_out: {config.hold_out}: this prior is unconditional. Leave it out.")
        return None, None
    return known, ConditionSplit.of(known, held_out_of(config, known), config.seed)


def held_out_of(config: Config, known: Sequence[int]) -> list[int]:
    """Return the classes to keep out of training: those that are named, or so many drawn by the seed."""
    count, names = config.hold_out, "prompts" if config.prompts else "classes"
    if isinstance(count, list):
        if unknown := [c for c in count if c not in known]:
            raise ValueError(
                f"hold_out: {unknown[0]} is none of the {len(known)} {names}. Name some of them by number."
            )
        count, apart = len(set(count)), sorted(set(count))
    else:
        if count is None:
            count = min(MOST_ENUMERATED, len(known) // HELD_OUT) if len(known) > MOST_ENUMERATED else 0
        order = torch.randperm(len(known), generator=stream(config.seed, "conditions to hold out"))
        apart = sorted(known[i] for i in order[:count].tolist())
    if count >= len(known):
        raise ValueError(f"hold_out: {count} of {len(known)} {names} leave none to train on. Hold out fewer.")
    return apart


def in_words(split: ConditionSplit, names: str) -> str:
    """Say that conditions are a population, and which of them figures are of."""
    text = f"{len(split.trained)} {names} are trained on as a population: drawn for each sample, certified on "
    text += "all" if len(split.measured) == len(split.trained) else f"{len(split.measured)} of them"
    if split.held_out:
        text += f"; {len(split.held_out)} are held out, and certified apart"
        text += "" if len(split.measured_held_out) == len(split.held_out) else f" on {len(split.measured_held_out)}"
    return text


def complete(
    values: dict[str, Any], config: Config, prior: Prior, inputs: list[ControlInputs], known: Sequence[int] | None,
    split: ConditionSplit | None, usual: dict[str, Any],
) -> tuple[Config, bool]:  # fmt: skip
    """Return the config with defaults for this prior and these data where `values` has none; refuse what cannot be.

    Return also whether a learner has fewer updates than by default, or than `usual` settings name.
    """
    sizes = {each.name: each.classes for each in inputs}
    fixed = [each.name for each in inputs if each.settings.settled_from]
    labels = Conditions.for_training({}, sizes, fixed).classes
    denoiser, groups = prior.denoiser, len(split.measured) if split else 1
    parameters = sum(p.numel() for p in denoiser.network.parameters())
    pooled = bool(split and split.pooled)
    defaults = suggested(denoiser.shape, parameters, denoiser.site.rank, groups, labels, pooled)
    guidance = prior.text.guidance if prior.text and config.guidance is None else config.guidance
    chosen = {"prompts": config.prompts, "guidance": guidance}
    whole = groups == MOST_ENUMERATED and list(known) == [*range(prior.classes)] and pooled
    chosen["classes"] = "all" if whole else known and list(known)
    chosen["hold_out"] = sorted(split.held_out) if pooled else None
    values = {
        **values,
        "controls": [
            control if control.get("settled_from") else {"interval": "auto", **control}
            for control in values["controls"]
        ],
    }
    defaults = limited(defaults, Config.from_values({**merged(defaults, values), **chosen}))
    config = Config.from_values({**merged(defaults, values), **chosen})
    check_batches(config)
    if "steps" not in values:  # the prior may have fewer timesteps
        config = config.with_(steps=next(k for k in range(config.steps, 0, -1) if k == 1 or fits(prior, config, k)))
    times_of(prior, config, config.steps)
    if config.evaluation.prior_samples < math.prod(sizes.values()):
        raise ValueError("evaluation.prior_samples must be at least the number of the controls' classes.")
    usual = merged(defaults, usual)
    updates = ((getattr(config, name).updates, usual.get(name, {}).get("updates", 0)) for name in config.learners)
    return config, any(count < most for count, most in updates)


def prompts_of(controls: list[ControlSettings]) -> list[str]:
    """Read the prompts in the data's column of c; refuse data without one."""
    control = next((control for control in controls if control.condition), None)
    if control is None:
        raise ValueError(
            "this prior is given text. Name the prompts to train on: --prompts FILE, or the column with --condition."
        )
    table = open_table(control.data, control.image)
    column = control.condition_column or control.condition
    table.check_columns([column])
    return list(in_order(text for text in table.texts(column) if not is_missing(text, control.missing == "keep")))


def read_inputs(settings: ControlSettings, prior: Prior | None, options: JobOptions = DEFAULT) -> ControlInputs:
    """Read the data and classifiers of a control; without a prior the images keep their size."""
    if settings.settled_from:
        folder = RunFolder(settings.settled_from).classifier(settings.name)
        return ControlInputs(settings, None, Panel.load(folder, options.trust), read_pages(folder))
    panel, pages = None, {}
    if folder := settings.classifier_from:
        panel, pages = Panel.load(Path(folder), options.trust), read_pages(Path(folder))
        if panel.latent and not prior.latent:
            raise ValueError(
                f"the classifier in {folder} looks at latents, and this prior has none. Fit it with --prior."
            )
        if panel.control != settings.name or panel.shape != prior.image_shape:
            raise ValueError(
                f"the classifier in {folder} is of {panel.control!r} on images of {panel.shape}; needed: "
                f"{settings.name!r} on {prior.image_shape}. Fit it with ctrl classifier --prior."
            )
    data = read_data(settings.data, settings, prior, panel and panel.values, phase=options.phase)
    space = data.space(settings.name)
    asked = (prior.image_shape, prior.class_names) if prior else (None, None)
    if settings.ruler and (reason := RULERS[settings.ruler].refusal(settings.name, space, *asked)):
        raise ValueError(f"ruler: {settings.ruler} {reason}. Leave the ruler out.")
    judge_data = None
    if settings.judge_data and not panel:
        same_kind = settings.model_copy(update={"kind": "scale" if space.scale else "classes"})
        conditional, phase = settings.classifier.conditional, options.phase
        judge_data = read_data(settings.judge_data, same_kind, prior, space.values, conditional, phase, data.levels)
    warn_of_copies(settings.data, data, judge_data)
    return ControlInputs(settings, data, panel, pages, judge_data)


def read_data(
    source: str, settings: ControlSettings, prior: Prior | None, values: tuple[str, ...] | None = None,
    condition: bool = True, phase: Phase = silent, levels: Levels | None = None,
) -> LabelledImages:  # fmt: skip
    """Read a dataset at the prior's size, with c (unless `condition` is False) numbered as the prior numbers it.

    `values` are the classes or levels that p̂ knows, None for those in the data, and `levels` what is black and white in
    other images of more than 8 bits.
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
        {name: settings.tag} if settings.tag else None, settings.skip_bad, phase, settings.image,
        settings.missing == "keep", levels, c if prior and prior.text else None,
    )  # fmt: skip


def select_classes(
    data: LabelledImages, condition: str, classes: Sequence[int], embed: Callable[[Tensor], Tensor] | None = None
) -> LabelledImages:
    """Return the rows whose condition is one of `classes`, with labels that count within these.

    `embed` makes vectors (n, F) of the prior's classes (n,), which stand for c in p̂(y | x, c); None for c by number.
    """
    number_of = torch.full((len(data.values[condition]),), -1)
    number_of[torch.tensor(classes)] = torch.arange(len(classes))
    numbers = number_of[data.labels[condition]]
    rows, vectors = (numbers >= 0).nonzero().squeeze(1), {}
    values, part = tuple(data.values[condition][c] for c in classes), data[rows]
    if embed:
        different, which = part.labels[condition].unique(return_inverse=True)
        vectors = {condition: embed(different)[which]}
    labels, values = {**part.labels, condition: numbers[rows]}, {**data.values, condition: values}
    return LabelledImages(part.x, labels, values, data.about, data.levels, vectors)


def encoder_of(prior: Prior | None) -> Callable[[Tensor], Tensor] | None:
    """Return the function from images to latents of a latent prior, else None."""
    return prior.encode if prior and prior.latent else None


def select_inputs(inputs: ControlInputs, classes: Sequence[int] | None, prior: Prior | None) -> ControlInputs:
    """Return the inputs with the rows of the trained classes; refuse too few rows, or a panel of other classes.

    p̂(y | x, c) of a prior that is given text gets the embedding of each row's prompt.
    """
    settings, data, judge_data, panel = inputs.settings, inputs.data, inputs.judge_data, inputs.panel
    condition, unread = settings.condition if data else None, None
    text = bool(condition and prior and prior.text)
    embedded = text and (panel.classifier.embedding if panel else settings.classifier.conditional)
    embed = prior.embedding_of if embedded else None
    if condition and classes:
        data = select_classes(data, condition, classes, embed)
    if judge_data:
        if classes and settings.classifier.conditional:
            judge_data = select_classes(judge_data, condition, classes, embed)
        judge_data.check_classes(settings.name)
    if text:
        unread = unreadable(data, condition)
    if data and panel:
        panel = checked_panel(panel, settings, data, unread is not None)
        unread = None if panel.reader else unread
    elif data:
        data.check_classes(settings.name)
    return replace(inputs, data=data, judge_data=judge_data, panel=panel, unread=unread)


def check_batches(config: Config) -> None:
    """Refuse a learner's batch that the processes cannot share."""
    for name in config.learners:
        try:
            ranks.rank_rows(getattr(config, name).batch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def checked_panel(panel: Panel, settings: ControlSettings, data: LabelledImages, unread: bool = False) -> Panel:
    """Refuse a panel without the judge or the reader that is needed; return it without a reader that is not.

    Of a c that is not read back neither a reader is needed nor, where p̂ does not count c, the same classes.
    """
    folder, condition, p_hat = settings.classifier_from, settings.condition, panel.classifier
    if panel.judge is None and not settings.ruler:
        raise ValueError(f"the classifier in {folder} has no judge. Fit it with ctrl classifier.")
    if condition is None and p_hat.conditional:
        raise ValueError(f"the classifier in {folder} is p̂(y | x, c). Name the column of c with --condition.")
    if condition is None:
        return replace(panel, reader=None, reader_accuracy=None)
    if p_hat.embedding and data.condition(condition).shape[1:] != (p_hat.embedding,):
        raise ValueError(
            f"the classifier in {folder} is given prompts by embeddings of length {p_hat.embedding}, which this prior "
            "does not make. Fit it with ctrl classifier --prior --condition."
        )
    if (panel.condition, panel.condition_values) == (condition, data.values[condition]):
        return panel
    if unread and (p_hat.embedding or not p_hat.conditional):
        return replace(panel, reader=None, reader_accuracy=None, condition=condition, condition_values=())
    raise ValueError(
        f"the classifier in {folder} has no reader of {condition!r} for the classes "
        f"{some_of(data.values[condition])}. Fit it with ctrl classifier --prior --condition."
    )


def classes_to_train(prior: Prior, inputs: list[ControlInputs]) -> Sequence[int] | None:
    """Choose the prior's classes to train and certify: those in the data, else all, and all of many prompts."""
    if prior.classes is None:
        return None
    if prior.text and prior.classes > MOST_ENUMERATED:
        return range(prior.classes)
    if labelled := next((each for each in inputs if each.data and each.settings.condition), None):
        return labelled.data.labels[labelled.settings.condition].unique().tolist()
    return range(prior.classes)


@torch.no_grad()
def dependences(inputs: list[ControlInputs], panels: dict[str, Panel], prior: Prior) -> dict[str, dict[str, float]]:
    """Measure what labels of two controls from one dataset say about each other beyond what p̂ sees; warn if much."""
    figures = {}
    usable = [i for i in inputs if i.data and not i.settings.skip_bad and not i.data.space(i.name).scale]
    for first, second in combinations(usable, 2):
        if first.settings.data != second.settings.data or len(first.data) != len(second.data):
            continue
        log_p = tuple(
            panels[each.name].log_prob(each.data.through(prior.encode) if panels[each.name].latent else each.data)
            for each in (first, second)
        )
        shared = dependence(log_p, (first.data.labels[first.name], second.data.labels[second.name]))
        names = f"{first.name} and {second.name}"
        figures[names] = vars(shared)
        if shared.clear:
            warnings.warn(
                f"labels of {names} say {shared.nats:.3f} nats about each other beyond what p̂ sees of x (p = "
                f"{shared.p_value:.1g}): either they depend on each other once x is known, where rewards do not add, "
                "or p̂ does not see all of x.",
                RuntimeWarning, 2,
            )  # fmt: skip
    return figures
