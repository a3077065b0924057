"""Choose, fit and check the classifiers of a control before any training: p̂, its judge and the reader of c."""

import warnings
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn

from ..data.images import joined_x
from ..data.labelled import RAREST, LabelledImages
from ..data.labels import LabelSpace
from ..system.progress import Advance, Phase, silent
from ..system.strict import Strict
from .backbone import Backbone, Frozen, Own
from .fit import AUGMENTATIONS, Network, Recipe, calibrated_nll, fit_classifier, report_classifier
from .heads import HEADS
from .panel import Panel, examples
from .scorer import Architecture, Scorer
from .support import Support

DEEP, BATCH = 4, 32
MOST_READ = 64  # prompts that a reader may tell apart
DECAYS = (1e-3, 1.0)  # of a linear head, and of embeddings: the features outnumber the images, or they do not
# shares of the labels: fit, calibration, held-out, and the judge's own
WITH_RULER, WITH_JUDGE = (0.7, 0.15, 0.15), (0.4, 0.1, 0.15, 0.35)
READER = Architecture(grid=4), Recipe(epochs=40, batch=64, lr=3e-3, weight_decay=0.01)  # of c


def checked_head(name: str) -> str:
    """Refuse a name that is neither "auto" nor of a head of classes."""
    names = ["auto", *(name for name, head in HEADS.items() if not head.scale)]
    if name not in names:
        raise ValueError(f"must be one of {', '.join(names)}")
    return name


class ClassifierSettings(Strict):
    """Describe p̂(y | x) and the judge; "auto" takes what calibrates best on data the fit has not seen.

    Args:
        head: of classes: "categorical", or "ordinal" for ordered ones; a scale has its own. Cost: "auto" fits each.
        grid: cells a side that features are averaged over: 1 for textures and amounts, 4 for shapes. Cost: "auto" fits
            several.
        depth: convolutions before the features are averaged. Cost: "auto" fits several.
        augment: changes of x that keep y.
        updates: gradient steps of a fit. Cost: time in proportion.
        balanced: give every class the same weight; p̂ stays the posterior under the data's own frequencies.
        early_stopping: keep p̂'s best epoch on the calibration part instead of the last.
        conditional: fit p̂(y | x, c), for a y whose meaning depends on c; needs the column of c.
        backbone: a folder or hub id of a frozen vision network; grid, depth and augment are not used then. Cost: its
            forward pass for every reward, and its gradient for `adjoint` and `backprop`.
        factory: "module:function" that makes the network, from K and (C, H, W).
        latents: p̂ takes a latent model's latents: no decoder in training, which saves its time and memory; the judge
            takes images.
    """

    head: Annotated[str, AfterValidator(checked_head)] = "auto"
    grid: Literal["auto"] | PositiveInt = "auto"
    depth: Literal["auto"] | PositiveInt = "auto"
    augment: Literal["none", "shift", "any_side_up", "half_turn"] = "shift"
    updates: int = Field(1500, ge=1)
    balanced: bool = False
    early_stopping: bool = False
    conditional: bool = False
    backbone: str | None = None
    factory: str | None = None
    latents: bool = False

    @model_validator(mode="after")
    def one_kind(self) -> "ClassifierSettings":
        """Refuse settings that exclude each other."""
        if self.latents and (self.backbone or self.augment in ("any_side_up", "half_turn")):
            # what was trained on images does not know latents
            raise ValueError("latents excludes a backbone and turning: a turned image's latents are not turned latents")
        if self.factory and (self.backbone or self.conditional or self.head == "ordinal"):
            raise ValueError("factory excludes backbone, conditional and an ordinal head")
        return self


def settings_of(panel: Panel, configured: ClassifierSettings) -> ClassifierSettings:
    """Return the settings that p̂ of a folder was fitted with; warn where the folder does not say them.

    What its network shows is then taken from there, the rest from what is `configured`.
    """
    if panel.settings is not None:
        return ClassifierSettings(**panel.settings)
    p_hat, known = panel.classifier, {"balanced", "conditional"}
    values = {name: getattr(p_hat, name) for name in known} | {"latents": panel.latent}
    names = {"backbone", "factory"} & set(p_hat.shape) or {"grid", "depth"} & set(p_hat.shape)
    values |= {name: p_hat.shape[name] for name in names}
    if not p_hat.head.scale and "factory" not in names:
        values["head"] = p_hat.head.name
    rest = {name: value for name, value in configured.model_dump().items() if name not in values}
    warnings.warn(
        f"the classifier of {panel.control!r} does not say how it was fitted: beside what its network shows, others "
        f"are fitted with updates {rest['updates']} and augment {rest['augment']}, as the config says.",
        stacklevel=2,
    )
    return ClassifierSettings(**rest, **values)


class Choice(NamedTuple):
    """Hold what the settings may leave open."""

    architecture: Architecture
    weight_decay: float = Recipe.weight_decay


def open_choices(settings: ClassifierSettings, space: LabelSpace, embedded: bool = False) -> list[Choice]:
    """Return the heads, grids and depths to try where the settings leave them open; on a backbone heads and decays.

    Where c is `embedded` decays are tried as well.
    """
    if settings.factory:
        return [Choice(Architecture())]
    named = settings.head != "auto" and not space.scale
    heads = (settings.head,) if named else [name for name, head in HEADS.items() if head.suits(space)]
    if settings.backbone:
        return [Choice(Architecture(head), decay) for head, decay in product(heads, DECAYS)]
    # few convolutions averaged over the image see amounts, a grid of averages sees places, more convolutions see shapes
    trunks: set[tuple[int, int | None]] = {
        (grid if settings.grid == "auto" else settings.grid, depth if settings.depth == "auto" else settings.depth)
        for grid, depth in ((1, None), (4, None), (1, DEEP))
    }
    decays = DECAYS if embedded else (Recipe.weight_decay,)
    architectures = (Architecture(head, *trunk) for head, trunk in product(heads, sorted(trunks, key=str)))
    return [Choice(*both) for both in product(architectures, decays)]


def epochs_of(updates: int, part: Sized) -> int:
    """Return the epochs on a part that make a number of updates: a small part needs as many as a large one."""
    return -(-updates // -(-len(part) // BATCH))


@dataclass
class Fitter:
    """Fit p̂ of a control, and then a judge of the same kind, each on a part of the labels."""

    control: str  # the column of y
    condition: str | None  # the column of c of p̂(y | x, c); None for p̂(y | x)
    settings: ClassifierSettings
    seed: int = 0  # of the fit of p̂; a judge's is the next
    device: torch.device | str = "cpu"  # on which they are fitted, and stay
    choice: Choice | None = None  # of the best calibrated p̂, once it is fitted

    @cached_property
    def trunk(self) -> Frozen | None:
        return Frozen(self.settings.backbone).to(self.device) if self.settings.backbone else None

    def choices(self, fitting: LabelledImages) -> list[Choice]:
        """Return what is tried on the fitting part."""
        return open_choices(self.settings, fitting.space(self.control), self.condition in fitting.vectors)

    def epochs(self, fitting: LabelledImages) -> int:
        """Return how many epochs `posterior` takes in all."""
        return len(self.choices(fitting)) * epochs_of(self.settings.updates, fitting)

    def inputs(self, data: LabelledImages) -> tuple[Tensor, ...]:
        """Return (x, y) or (x, y, c) as the fit takes them: a backbone's features in place of x, computed once."""
        x, *labels = examples(data, self.control, self.condition)
        return self.trunk.features(x) if self.trunk else x, *labels

    def network(self, choice: Choice, part: LabelledImages) -> Network:
        """Return what builds the chosen network; on a backbone its head alone."""
        settings, conditions, embedding = self.settings, 0, 0
        if self.condition in part.vectors:
            embedding = part.vectors[self.condition].shape[1]
        elif self.condition:
            conditions = len(part.values[self.condition])
        factory, trunk = settings.factory, self.trunk
        if factory:
            return lambda shape, classes: Own(factory, classes, shape, settings.balanced)
        if trunk:
            options = (choice.architecture.head, settings.balanced, conditions, nn.Identity(), embedding)
            return lambda shape, classes: Backbone(trunk.source, shape[0], classes, *options)
        architecture = replace(choice.architecture, balanced=settings.balanced)
        return replace(architecture, conditions=conditions, embedding=embedding)

    def fit(
        self, part: LabelledImages, inputs: tuple[Tensor, ...], choice: Choice, seed: int, advance: Advance,
        watch: tuple[Tensor, ...] | None = None,
    ) -> Scorer:  # fmt: skip
        """Fit one classifier, uncalibrated, on the `inputs` of a part; early stopping measures on `watch`."""
        x, y, *c = inputs
        augment = None if self.trunk else AUGMENTATIONS[self.settings.augment]
        recipe = Recipe(epochs_of(self.settings.updates, y), BATCH, weight_decay=choice.weight_decay, augment=augment)
        options = (self.network(choice, part), recipe, c[0] if c else None, watch, seed, advance, self.device)
        return fit_classifier(x, y, len(part.values[self.control]), *options)

    def finish(self, classifier: Scorer) -> Scorer:
        """Put a fitted classifier on its backbone and the device."""
        classifier.trunk = self.trunk or classifier.trunk
        return classifier.to(self.device)

    def posterior(
        self, images: Sequence[LabelledImages], advance: Advance, encode: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Panel, LabelledImages]:
        """Fit every open choice on one of three parts, keep the best calibrated on the next, report on the last.

        `encode` makes latents of images. Returns the panel of p̂, and the last part, images or latents as p̂ takes them.
        """
        fitting, calibration, held_out = (part.through(encode) if self.settings.latents else part for part in images)
        x, *labels = self.inputs(fitting)
        inputs, unseen = (self.trunk.fit(x) if self.trunk else x, *labels), self.inputs(calibration)
        watch = unseen if self.settings.early_stopping else None
        fits: list[tuple[float, int, Scorer, Choice]] = []
        for choice in self.choices(fitting):
            classifier = self.fit(fitting, inputs, choice, self.seed, advance, watch)
            fits.append((calibrated_nll(classifier, *unseen), len(fits), classifier, choice))
        _, _, classifier, self.choice = min(fits)
        classifier = self.finish(classifier)
        classifier.latent = self.settings.latents
        quality = report_classifier(classifier, *examples(held_out, self.control, self.condition))
        (_, *shape), space = images[0].x.shape, held_out.space(self.control)
        with torch.no_grad():
            fitted, *others = (classifier.evidence(part.x).cpu() for part in (fitting, calibration, held_out))
        support = Support.fit(fitted).calibrate(torch.cat(others))
        settings = self.settings.model_dump()
        size = shape[0], shape[1], shape[2]
        return Panel(self.control, space, size, classifier, quality, support=support, settings=settings), held_out

    def judge(self, part: LabelledImages, advance: Advance) -> Scorer:
        """Fit a judge as p̂ was chosen to be, uncalibrated."""
        assert self.choice is not None  # `posterior` makes it
        return self.finish(self.fit(part, self.inputs(part), self.choice, self.seed + 1, advance))


def shares_of(ruler: bool, judge_data: bool) -> tuple[float, ...]:
    """Return the shares of the labels that p̂ and, where nothing else measures y, its judge take."""
    return WITH_RULER if ruler or judge_data else WITH_JUDGE


@torch.no_grad()
def accuracy(classifier: Scorer, data: LabelledImages, column: str, condition: str | None = None) -> float:
    """Return the share of a column's labels that the classifier finds likeliest."""
    x, y, *c = examples(data, column, condition)
    return float((classifier.log_prob(x, *c).argmax(1).cpu() == data.space(column).nearest(y)).float().mean())


def check_settings(
    settings: ClassifierSettings, data: LabelledImages, control: str, condition: str | None, latents: bool
) -> None:
    """Refuse settings that do not suit the data, or latents where there are none, by a ValueError."""
    if settings.latents and not latents:
        raise ValueError("classifier.latents: p̂ looks at latents, but there is no prior on latents. Leave it out.")
    if data.space(control).scale and (settings.balanced or settings.factory):
        raise ValueError(f"{control!r} is on a scale: classifier.balanced and classifier.factory are for classes.")
    if settings.conditional and condition is None:
        raise ValueError("classifier.conditional: p̂(y | x, c) needs the column of c. Name it with --condition.")
    if settings.conditional and condition and condition not in data.vectors:
        data.check_classes(condition)
    if settings.augment == "any_side_up" and data.x.shape[2] != data.x.shape[3]:
        raise ValueError("classifier.augment: any_side_up needs square images. Use shift or none.")


def unreadable(data: LabelledImages, condition: str) -> str | None:
    """Say why no classifier could tell the prompts in a column of c apart; None if one may."""
    prompts = len(data.labels[condition].unique())
    if prompts <= MOST_READ and len(data) >= RAREST * prompts:
        return None
    return f"{condition} is not read back: {len(data)} images have {prompts} prompts; adherence is not measured."


def fit_panel(
    data: LabelledImages, control: str, condition: str | None = None, ruler: bool = False,
    settings: ClassifierSettings | None = None, seed: int = 0, phase: Phase = silent,
    judge_data: LabelledImages | None = None, encode: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu", check: bool = True, read: bool = True,
) -> tuple[Panel, LabelledImages]:  # fmt: skip
    """Fit p̂, and the judge and the reader that are needed, each on its own part of the labels.

    Returns the panel, and the held-out part that none of them was fitted on, images or latents as p̂ takes them. Raises
    ValueError if the settings do not suit the data, or p̂ is not better than chance there by two standard errors.

    Args:
        control, condition: the columns of y and c. Conditional p̂ and judge depend on c, by its embedding where the data
            have `vectors` of it.
        ruler: whether a ruler measures y, so that no judge is needed.
        judge_data: what the judge is fitted on, also beside a ruler; p̂ then keeps more of the data.
        encode: images → latents, for a p̂ on these.
        device: on which they are fitted, and stay.
        check: refuse a p̂ no better than chance.
        read: whether c also gets a reader.
    """
    settings = settings or ClassifierSettings()
    check_settings(settings, data, control, condition, encode is not None)
    images = data.split(control, shares_of(ruler, judge_data is not None), seed)
    judge_parts = images[3:] if judge_data is None else [judge_data]
    fitter = Fitter(control, condition if settings.conditional else None, settings, seed, device)
    epochs = fitter.epochs(images[0]) + sum(epochs_of(settings.updates, part) for part in judge_parts)
    advance = phase("classifier", epochs)
    panel, held_out = fitter.posterior(images[:3], advance, encode)
    if check and not panel.informed:
        q = panel.quality
        raise ValueError(
            f"the classifier of {control!r} is not clearly better than chance (held-out NLL {q.nll:.2f} ± "
            f"{q.nll_stderr:.2f} nats, chance {q.chance_nll:.2f}): its gradients would mislead. Check the labels or "
            "bring more of them."
        )
    for part in judge_parts:
        panel.judge, panel.judge_images = fitter.judge(part, advance), part.digest_rows()
        panel.judge_accuracy = accuracy(panel.judge, images[2], control, fitter.condition)
    if condition:
        panel.condition, panel.condition_values = condition, data.values[condition] if read else ()
    if condition and read:
        parts = (*images[:2], *images[3:])
        x, c = joined_x([part.x for part in parts]), torch.cat([part.labels[condition] for part in parts])
        advance = phase(f"reader of {condition}", READER[1].epochs)
        options: dict[str, Any] = {"seed": seed, "progress": advance, "device": device}
        panel.reader = fit_classifier(x, c, len(panel.condition_values), *READER, **options).to(device)
        panel.reader_accuracy = accuracy(panel.reader, images[2], condition)
    return panel, held_out
