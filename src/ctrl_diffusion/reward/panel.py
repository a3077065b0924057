"""Hold p̂ of one control with its judge and its reader; save and load them as one folder.

classifier.*    p̂(y | x), the reward, fitted on one part of the labels, calibrated on a second
support.*       the region p̂ was fitted on
judge/          a second classifier, fitted on a part of its own, and which images it was fitted on; only where no ruler
                measures y
reader/         reads the prior's condition c; only where the data have a column for it
report.html     how good they are on held-out data, with reliability.png and confusion.png
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.labelled import LabelledImages
from ..data.labels import LabelSpace
from ..system.files import read_tensors, undamaged, write_tensors
from .backbone import Elsewhere, load_classifier
from .fit import ClassifierReport
from .heads import coverage
from .scorer import Scorer
from .support import Support

SUPPORT, JUDGE_IMAGES = "support.safetensors", "judge/images.safetensors"
OTHERS, ACCURACIES = ("judge", "reader"), ("judge_accuracy", "reader_accuracy")


@dataclass
class Panel:
    """Hold the classifiers of one control."""

    control: str  # the column of y
    space: LabelSpace
    shape: tuple[int, int, int]  # (C, H, W) of the images
    classifier: Scorer  # p̂(y | x)
    quality: ClassifierReport  # on held-out data, as the accuracies below
    judge: Scorer | None = None  # shares no label with p̂; None where a ruler measures y
    judge_accuracy: float | None = None
    reader: Scorer | None = None  # of c; None if the data have no condition
    reader_accuracy: float | None = None
    condition: str | None = None  # the column of c
    condition_values: tuple[str, ...] = ()
    support: Support | None = None  # the region p̂ was fitted on
    settings: dict[str, Any] | None = None  # `ClassifierSettings` that p̂ was fitted with; None where that is not known
    judge_images: Tensor | None = None  # (n, 16) digests of the images the judge was fitted on; None as the settings

    @property
    def values(self) -> tuple[str, ...]:
        return self.space.values

    @property
    def latent(self) -> bool:
        return self.classifier.latent

    @property
    def informed(self) -> bool:
        """Whether p̂ is better than chance on held-out data, by two standard errors."""
        return self.quality.nll + 2 * self.quality.nll_stderr < self.quality.chance_nll

    def to(self, device: torch.device) -> "Panel":
        """Move the networks to a device; return the panel."""
        for network in filter(None, (self.classifier, self.judge, self.reader)):
            network.to(device)
        return self

    @torch.no_grad()
    def outside(self, x: Tensor) -> Tensor:
        """Return whether each x (n, C, H, W), images or latents as p̂ takes them, lies outside the region: (n,)."""
        assert self.support is not None, "no region is known"
        return self.support.outside(self.classifier.evidence(x).cpu())

    def examples(self, data: LabelledImages) -> tuple[Any, ...]:
        """Return (x, y), or (x, y, c) of p̂(y | x, c), of labelled images."""
        return examples(data, self.control, self.condition if self.classifier.conditional else None)

    @torch.no_grad()
    def log_prob(self, data: LabelledImages) -> Tensor:
        """Return log p̂ (n, K) of labelled images, given their c if it is p̂(y | x, c)."""
        x, _, *c = self.examples(data)
        return self.classifier.log_prob(x, *c).cpu()

    @torch.no_grad()
    def intervals(self, data: LabelledImages) -> tuple[Tensor, Tensor]:
        """Return, of y on a scale, the central intervals of 10 … 90 % and the share of y each holds: two (9,)."""
        x, y, *c = self.examples(data)
        scores, temperature = self.classifier.scores(x, *c), self.classifier.temperature
        density = self.classifier.head.density(scores.cpu(), temperature.cpu())
        assert density is not None, "y is not on a scale"
        return coverage(density, y)

    def metrics(self) -> dict[str, Any]:
        """Return the figures by the names metrics.json uses."""
        return {**asdict(self.quality), **{name: getattr(self, name) for name in ACCURACIES}}

    def save(self, folder: Path) -> None:
        """Write the folder's weights and `classifier.json`."""
        about: dict[str, Any] = {
            "control": self.control,
            "values": self.values,
            "input": self.shape,
            "report": self.metrics(),
        }
        about |= {"condition": self.condition, "condition_values": self.condition_values, "latent": self.latent}
        self.classifier.save(folder, about | ({} if self.settings is None else {"settings": self.settings}))
        if self.support:
            self.support.save(folder / SUPPORT)
        for name in OTHERS:
            if classifier := getattr(self, name):
                classifier.save(folder / name)
        if self.judge_images is not None:
            write_tensors(folder / JUDGE_IMAGES, {"digests": self.judge_images})

    @classmethod
    def load(cls, folder: Path, trust: bool = False) -> "Panel":
        """Read a folder that `save` wrote; with `trust` run code that it names; refuse (ValueError) a damaged one."""
        if not (folder / "classifier.json").is_file():
            raise ValueError(
                f"{folder} holds no classifier. Fit one with: ctrl classifier DATA --control NAME --out DIR"
            )
        with undamaged(folder, "Fit it again.", but=(Elsewhere,)):
            about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
            accuracies = {name: about["report"].pop(name) for name in ACCURACIES}
            others: dict[str, Any] = {
                name: load_classifier(folder / name, trust) for name in OTHERS if (folder / name).is_dir()
            }
            support = Support.load(folder / SUPPORT) if (folder / SUPPORT).is_file() else None
            images = read_tensors(folder / JUDGE_IMAGES)["digests"] if (folder / JUDGE_IMAGES).is_file() else None
            classifier = load_classifier(folder, trust)
            classifier.latent = about.get("latent", False)
            return cls(
                about["control"], LabelSpace(tuple(about["values"]), classifier.head.scale), tuple(about["input"]),
                classifier, ClassifierReport(**about["report"]), **others, **accuracies, condition=about["condition"],
                condition_values=tuple(about["condition_values"]), support=support,
                settings=about.get("settings"), judge_images=images,
            )  # fmt: skip


def examples(data: LabelledImages, column: str, condition: str | None) -> tuple[Any, ...]:
    """Return (x, y) of a column of labels, or with the column of a condition (x, y, c), c as p̂ is given it."""
    return data.x, data.labels[column], *([data.condition(condition)] if condition else [])
