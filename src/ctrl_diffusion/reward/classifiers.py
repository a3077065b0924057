"""What is fitted on the labels before any training: p̂ itself, the judge of y and the reader of c.

classifier.*    p̂(y | x), the reward, fitted on one part of the labels, calibrated on a second
support.*       the region p̂ was fitted on
judge/          a second classifier, fitted on a part p̂ never met; only where no ruler measures y
reader/         reads the prior's condition c; only where the data have a column for it
report.html     how good they are on held-out data, with reliability.png and confusion.png
"""

import json
from collections.abc import Callable, Sequence, Sized
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from ..data.images import joined_x
from ..data.labelled import LabelledImages
from ..data.labels import LabelSpace
from ..system.files import undamaged
from ..system.progress import Advance, Phase, silent
from ..system.strict import Strict
from .backbone import Backbone, Elsewhere, Frozen, Own, load_classifier
from .fit import AUGMENTATIONS, ClassifierReport, calibrated_nll, coverage, fit_classifier, report_classifier
from .scorer import Classifier, Scorer
from .support import Support


class ClassifierSettings(Strict):
    """p̂(y | x) and the judge; "auto" takes what calibrates best on data the fit has not seen.

    Args:
        balanced: fit with every class weighing the same; p̂ stays the posterior under the data's own frequencies.
        early_stopping: keep p̂'s best epoch on the calibration part instead of the last.
        conditional: p̂(y | x, c), for a y whose meaning depends on c; needs the column of c.
        backbone: a frozen vision network of transformers, a folder or a hub id, on whose features a linear head is
            fitted; grid, depth and augment are not used then.
        factory: "module:function" that makes the network, from K and (C, H, W).
        latents: p̂ looks at a latent model's latents: no decoder in training; the judge looks at images all the same.
    """

    head: Literal["auto", "categorical", "ordinal"] = "auto"
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
        """A factory's network has its own head and features; what was trained on images does not know latents."""
        if self.latents and (self.backbone or self.augment in ("any_side_up", "half_turn")):
            raise ValueError(
                "latents excludes a backbone, and turning: a turned image's latents are not turned latents"
            )
        if self.factory and (self.backbone or self.conditional or self.head == "ordinal"):
            raise ValueError("factory excludes backbone, conditional and an ordinal head")
        return self


Choice = dict[str, Any]  # options of `fit_classifier` and of the network it fits
DEEP, BATCH = 4, 32
SUPPORT = "support.safetensors"
DECAYS = (1e-3, 1.0)  # of a linear head: the features outnumber the images, or they do not
# shares of the labels: fit, calibration, held-out, and the judge's own
WITH_RULER, WITH_JUDGE = (0.7, 0.15, 0.15), (0.4, 0.1, 0.15, 0.35)


@dataclass
class Panel:
    """The classifiers of one run.

    Args:
        control: the column p̂ was fitted on.
        values: the names of its classes, in order.
        shape: (C, H, W) of the images it was fitted on.
        classifier: p̂(y | x).
        quality: of p̂ on held-out data.
        judge: a classifier of y that shares no label with p̂; None where a ruler measures y.
        judge_accuracy: on held-out data.
        reader: a classifier of c; None if the data have no condition.
        reader_accuracy: on held-out data.
        condition: the column of c, which the reader was fitted on and p̂(y | x, c) is given.
        condition_values: the names of its classes, in order.
        support: the region p̂ was fitted on.
    """

    control: str
    values: tuple[str, ...]
    shape: tuple[int, int, int]
    classifier: Scorer
    quality: ClassifierReport
    judge: Scorer | None = None
    judge_accuracy: float | None = None
    reader: Classifier | None = None
    reader_accuracy: float | None = None
    condition: str | None = None
    condition_values: tuple[str, ...] = ()
    support: Support | None = None

    @property
    def space(self) -> LabelSpace:
        """What y is."""
        return LabelSpace(self.values, self.classifier.head == "gaussian")

    @property
    def latent(self) -> bool:
        """Whether p̂ looks at latents instead of images."""
        return self.classifier.latent

    def to(self, device: torch.device) -> "Panel":
        """The same, their networks on a device."""
        for network in (self.classifier, self.judge, self.reader):
            if network:
                network.to(device)
        return self

    @property
    def informed(self) -> bool:
        """Whether p̂ is better than chance on held-out data, by two standard errors."""
        return self.quality.nll + 2 * self.quality.nll_stderr < self.quality.chance_nll

    @torch.no_grad()
    def outside(self, x: Tensor) -> Tensor:
        """Whether each x (n, C, H, W), as p̂ looks at it, lies outside the region it was fitted on: (n,)."""
        return self.support.outside(self.classifier.evidence(x).cpu())

    def seen(self, data: LabelledImages) -> tuple[Tensor, ...]:
        """What p̂ is given of labelled images, and their labels: (x, y) or (x, y, c)."""
        return examples(data, self.control, self.condition if self.classifier.conditional else None)

    @torch.no_grad()
    def log_prob(self, data: LabelledImages) -> Tensor:
        """log p̂ of labelled images, of y given what they say of c: (n, K)."""
        x, _, *c = self.seen(data)
        return self.classifier.log_prob(x, *c).cpu()

    @torch.no_grad()
    def intervals(self, data: LabelledImages) -> tuple[Tensor, Tensor]:
        """Of y on a scale, the central intervals of 10 … 90 % and how often they hold y: two (9,)."""
        x, y, *c = self.seen(data)
        scores, temperature = self.classifier.scores(x, *c), self.classifier.temperature
        return coverage(self.classifier.density(scores.cpu(), temperature.cpu()), y)

    def metrics(self) -> dict[str, Any]:
        """Figures by the names metrics.json uses."""
        return {
            **asdict(self.quality), "judge_accuracy": self.judge_accuracy, "reader_accuracy": self.reader_accuracy
        }  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write the folder's weights and `classifier.json`."""
        about = {"control": self.control, "values": self.values, "input": self.shape, "report": self.metrics()}
        about |= {"condition": self.condition, "condition_values": self.condition_values, "latent": self.latent}
        self.classifier.save(folder, about)
        if self.support:
            self.support.save(folder / SUPPORT)
        for name, classifier in (("judge", self.judge), ("reader", self.reader)):
            if classifier:
                classifier.save(folder / name)

    @classmethod
    def load(cls, folder: Path, trust: bool = False) -> "Panel":
        """Read a folder that `save` wrote.

        Args:
            folder: the folder.
            trust: run code that it names.

        Raises:
            ValueError: no such folder, a damaged one, or one that needs a network which is not there.
        """
        if not (folder / "classifier.json").is_file():
            raise ValueError(
                f"{folder} holds no classifier. Fit one with: ctrl classifier DATA --control NAME --out DIR"
            )
        with undamaged(folder, "Fit it again.", but=(Elsewhere,)):
            about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
            report = dict(about["report"])
            judge_accuracy, reader_accuracy = report.pop("judge_accuracy"), report.pop("reader_accuracy")
            others = {n: load_classifier(folder / n, trust) for n in ("judge", "reader") if (folder / n).is_dir()}
            support = Support.load(folder / SUPPORT) if (folder / SUPPORT).is_file() else None
            classifier = load_classifier(folder, trust)
            classifier.latent = about.get("latent", False)
            return cls(
                about["control"], tuple(about["values"]), tuple(about["input"]), classifier,
                ClassifierReport(**report), others.get("judge"), judge_accuracy, others.get("reader"), reader_accuracy,
                about["condition"], tuple(about["condition_values"]), support,
            )  # fmt: skip


def are_numbers(values: tuple[str, ...]) -> bool:
    """Whether every name is a number, so that the classes have an order."""
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False


@torch.no_grad()
def examples(
    data: LabelledImages, column: str, condition: str | None, trunk: Frozen | None = None
) -> tuple[Tensor, ...]:
    """x or its features, the labels of a column and, where it depends on a condition, c."""
    few = torch.arange(len(data)).split(Backbone.at_once)
    x = data.x if trunk is None else torch.cat([trunk(data.x[rows].to(trunk.grey.device)).cpu() for rows in few])
    return x, data.labels[column], *([data.labels[condition]] if condition else [])


def fit_calibrated(
    fitting: LabelledImages,
    calibration: LabelledImages,
    column: str,
    condition: str | None,
    settings: ClassifierSettings,
    seed: int,
    advance: Advance,
    trunk: Frozen | None,
    device: torch.device | str,
) -> tuple[Scorer, Choice]:
    """The best calibrated of the classifiers the settings leave open, by NLL on the calibration part."""
    found, (x, *labels) = [], examples(fitting, column, condition, trunk)
    mine = (trunk.fit(x) if trunk else x, *labels)
    seen, sizes = examples(calibration, column, condition, trunk), sizes_of(fitting, column, condition)
    for choice in open_choices(settings, fitting.space(column)):
        watch = seen if settings.early_stopping else None
        classifier = fit_on(mine, sizes, choice, settings, seed, advance, trunk, watch, device)
        found.append((calibrated_nll(classifier, *seen), len(found), classifier, choice))
    return min(found)[2:]


def sizes_of(data: LabelledImages, column: str, condition: str | None) -> tuple[int, int]:
    """Number of classes of y and of c, 0 if it does not count."""
    return len(data.values[column]), len(data.values[condition]) if condition else 0


def open_choices(settings: ClassifierSettings, space: LabelSpace) -> list[Choice]:
    """Head, grid and depth where the settings leave them open; the decay of a head on a backbone.

    An ordinal head needs three or more numbers as names. Few convolutions averaged over the image see amounts, a grid
    of averages sees places, more convolutions see shapes.
    """
    if settings.factory:
        return [{}]
    heads = ("categorical", "ordinal") if are_numbers(space.values) and space.size > 2 else ("categorical",)
    heads = heads if settings.head == "auto" else (settings.head,)
    heads = ("gaussian",) if space.scale else heads
    if settings.backbone:
        return [{"head": head, "weight_decay": decay} for head, decay in product(heads, DECAYS)]
    trunks: set[tuple[int, int | None]] = {
        (grid if settings.grid == "auto" else settings.grid, depth if settings.depth == "auto" else settings.depth)
        for grid, depth in ((1, None), (4, None), (1, DEEP))
    }
    tried = product(heads, sorted(trunks, key=str))
    return [{"head": head, "grid": grid, "depth": depth} for head, (grid, depth) in tried]


def epochs_of(settings: ClassifierSettings, part: Sized) -> int:
    """Rounds through a part that make the settings' number of updates: a small part needs as many as a large one."""
    return -(-settings.updates // -(-len(part) // BATCH))


def fit_on(
    seen: tuple[Tensor, ...],
    sizes: tuple[int, int],
    choice: Choice,
    settings: ClassifierSettings,
    seed: int,
    advance: Advance,
    trunk: Frozen | None = None,
    watch: tuple[Tensor, ...] | None = None,
    device: torch.device | str = "cpu",
) -> Scorer:
    """One classifier, not calibrated, of (x, y) or (x, y, c); on a trunk its head, fitted on what the trunk sees.

    Images stay as they are before a trunk: their features are computed once. `watch` is what early stopping sees.
    """
    (x, y, *c), (classes, conditions), network = seen, sizes, None
    options = {"balanced": settings.balanced, "conditions": conditions}
    if trunk:
        more = {**options, "head": choice["head"], "trunk": nn.Identity()}
        network = partial(Backbone, trunk.source, x.shape[1], classes, **more)
    if settings.factory:
        network = partial(Own, settings.factory, classes, x.shape[1:], settings.balanced)
    return fit_classifier(
        x, y, classes, **choice, **options, network=network, c=c[0] if c else None, epochs=epochs_of(settings, y),
        batch=BATCH, seed=seed, augment=None if trunk else AUGMENTATIONS[settings.augment], progress=advance,
        watch=watch, device=device,
    )  # fmt: skip


@torch.no_grad()
def accuracy(classifier: Scorer, data: LabelledImages, column: str, condition: str | None = None) -> float:
    """Share of a column's labels that the classifier finds."""
    x, y, *c = examples(data, column, condition)
    return float((classifier.log_prob(x, *c).argmax(1).cpu() == data.space(column).nearest(y)).float().mean())


def joined(*parts: LabelledImages) -> LabelledImages:
    """Parts of one dataset as one."""
    labels = {name: torch.cat([part.labels[name] for part in parts]) for name in parts[0].labels}
    return LabelledImages(joined_x([part.x for part in parts]), labels, parts[0].values)


def rounds_of(settings: ClassifierSettings, fitting: LabelledImages, control: str) -> int:
    """Rounds through the fitting part that `fit_posterior` takes in all."""
    choices = open_choices(settings, fitting.space(control))
    return len(choices) * epochs_of(settings, fitting)


def fit_posterior(
    images: Sequence[LabelledImages],
    control: str,
    of_c: str | None,
    settings: ClassifierSettings,
    seed: int,
    advance: Advance,
    trunk: Frozen | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Panel, Choice, LabelledImages]:
    """Fit, calibrate and report p̂, with the region it was fitted on.

    Args:
        images: three parts: to fit, to calibrate, held out.
        control: the column of y.
        of_c: the column of c of p̂(y | x, c).
        settings: of the classifiers.
        seed: of the fit.
        advance: called after each of `rounds_of` rounds.
        trunk: a frozen backbone.
        encode: images → latents, for a p̂ that looks at these.
        device: on which it is fitted, and stays.

    Returns:
        Panel that have p̂ alone, the options it was fitted with, and the held-out part as p̂ looks at it.
    """
    fitting, calibration, held_out = (part.through(encode) if settings.latents else part for part in images)
    classifier, choice = fit_calibrated(fitting, calibration, control, of_c, settings, seed, advance, trunk, device)
    classifier.trunk, classifier.latent = trunk or classifier.trunk, settings.latents
    classifier.to(device)
    quality = report_classifier(classifier, *examples(held_out, control, of_c))
    panel = Panel(control, held_out.values[control], tuple(images[0].x.shape[1:]), classifier, quality)
    with torch.no_grad():
        met, *unseen = (classifier.evidence(part.x).cpu() for part in (fitting, calibration, held_out))
    panel.support = Support.fit(met).calibrate(torch.cat(unseen))
    return panel, choice, held_out


def fit_panel(
    data: LabelledImages,
    control: str,
    condition: str | None = None,
    ruler: bool = False,
    settings: ClassifierSettings | None = None,
    seed: int = 0,
    phase: Phase = silent,
    judge_data: LabelledImages | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    check: bool = True,
) -> tuple[Panel, LabelledImages]:
    """Fit p̂, and the judge and the reader that are needed, each on its own part of the labels.

    Args:
        data: the labelled images.
        control: the column of y.
        condition: the column of c; also fits a reader, and p̂ and the judge depend on it if they are conditional.
        ruler: whether a ruler measures y, so that no judge is needed.
        settings: of the classifiers.
        seed: of the parts and the fits.
        phase: told of progress.
        judge_data: what the judge is fitted on, also beside a ruler, so that p̂ keeps the more of the data.
        encode: images → latents, for a p̂ that looks at these.
        device: on which they are fitted, and stay.
        check: refuse a p̂ that says nothing.

    Returns:
        The panel, and the held-out part that none of them met, as p̂ looks at it.

    Raises:
        ValueError: on held-out data p̂ is not better than chance by two standard errors; p̂(y | x, c) without a
            column of c, or with too few examples of one; p̂ on latents, and nothing to encode images with.
    """
    settings = settings or ClassifierSettings()
    if settings.latents and encode is None:
        raise ValueError("classifier.latents: p̂ looks at latents, but there is no prior on latents. Leave it out.")
    if data.space(control).scale and (settings.balanced or settings.factory):
        raise ValueError(f"{control!r} is on a scale: classifier.balanced and classifier.factory are for classes.")
    if settings.conditional and condition is None:
        raise ValueError("classifier.conditional: p̂(y | x, c) needs the column of c. Name it with --condition.")
    if of_c := condition if settings.conditional else None:
        data.check_classes(of_c)
    if settings.augment == "any_side_up" and data.x.shape[2] != data.x.shape[3]:
        raise ValueError("classifier.augment: any_side_up needs square images. Use shift or none.")
    shares = WITH_JUDGE if judge_data is None and not ruler else WITH_RULER
    images = data.split(control, shares, seed)
    own = images[3:]
    of_judge = own if judge_data is None else [judge_data]
    rounds = rounds_of(settings, images[0], control)
    advance = phase("classifier", rounds + sum(epochs_of(settings, part) for part in of_judge))
    trunk = Frozen(settings.backbone).to(device) if settings.backbone else None
    found = fit_posterior(images[:3], control, of_c, settings, seed, advance, trunk, encode, device)
    panel, choice, held_out = found
    if check and not panel.informed:
        q = panel.quality
        raise ValueError(
            f"the classifier of {control!r} is not clearly better than chance (held-out NLL {q.nll:.2f} ± "
            f"{q.nll_stderr:.2f} nats, chance {q.chance_nll:.2f}): its gradients would mislead. Check the labels or "
            "bring more of them."
        )
    for part in of_judge:
        seen, sizes = examples(part, control, of_c, trunk), sizes_of(data, control, of_c)
        panel.judge = fit_on(seen, sizes, choice, settings, seed + 1, advance, trunk, device=device)
        panel.judge.trunk = trunk or panel.judge.trunk
        panel.judge.to(device)
        panel.judge_accuracy = accuracy(panel.judge, images[2], control, of_c)
    if condition:
        met = joined(*images[:2], *own)
        recipe = {"epochs": 40, "batch": 64, "lr": 3e-3, "weight_decay": 0.01}
        panel.reader = fit_classifier(
            met.x, met.labels[condition], len(met.values[condition]), grid=4, seed=seed,
            progress=phase(f"reader of {condition}", 40), device=device, **recipe,
        )  # fmt: skip
        panel.reader_accuracy = accuracy(panel.reader.to(device), images[2], condition)
        panel.condition, panel.condition_values = condition, data.values[condition]
    return panel, held_out
