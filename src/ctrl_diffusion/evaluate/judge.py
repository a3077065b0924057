"""Measure samples: their y by a ruler or by a classifier p̂ never met, their condition c, and their features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain.codec import Codec
from ..chain.rows import parts, rows_of
from ..control.conditions import Conditions
from ..data.labels import Labels
from ..reward.reward import Conditioned, Embedded
from ..reward.scorer import Scorer

Labeller = Callable[[Tensor, Tensor | None], Tensor]
MOST_SIDE = 32  # of images whose pixels are compared


@dataclass
class Observation:
    """Hold what was measured of n samples."""

    labels: Labels  # control → the class of y (n,), by the ruler where there is one, else by the judge; NULL if unknown
    judge_labels: Labels  # control → the class of y (n,), by the judge
    features: Tensor  # (n, F), in which diversity and distances are measured
    adheres: Tensor | None  # (n,), 1 where the reader reads the condition that was asked for; None without a reader
    outside: Tensor | None  # (n,), 1 outside the region p̂ was fitted on; None if that is not known

    def __getitem__(self, rows: Tensor) -> "Observation":
        adheres, outside = (None if t is None else t[rows] for t in (self.adheres, self.outside))
        labels, judge_labels = rows_of(self.labels, rows), rows_of(self.judge_labels, rows)
        return Observation(labels, judge_labels, self.features[rows], adheres, outside)

    @classmethod
    def cat(cls, batches: "list[Observation]") -> "Observation":
        """Join the observations of batches."""

        def joined(values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                return {name: torch.cat([value[name] for value in values]) for name in values[0]}
            return None if values[0] is None else torch.cat(values)

        return cls(**{name: joined([getattr(batch, name) for batch in batches]) for name in vars(batches[0])})


@dataclass
class SecondOpinion:
    """Measure samples independently of p̂.

    Args:
        rulers: control → x (n, C, H, W) and the prior's c (n,), if it has any → the class of y (n,), as the labels were
            made; NULL where nothing can be measured. Without one the judge decides.
        reader: a classifier of the prior's conditions c; its features measure diversity. Without one diversity is in
            pixels and adherence is not measured, nor is it of conditions that the reader does not know.
        judges: control → a classifier of y, fitted on labels p̂ never saw; its accuracy is reported beside the ruler's.
        outside: samples (n, *) and their images (n, C, H, W) → whether each lies outside the region of some p̂ (n,).
        codec: turns samples (n, *) into images.
        device: where the classifiers are.
        classes: the prior's classes c that reader and judges number 0 … n − 1; None where conditions are numbered so.
    """

    rulers: dict[str, Labeller]
    reader: Scorer | None = None
    judges: dict[str, Scorer | Conditioned] = field(default_factory=dict)
    outside: Callable[[Tensor, Tensor], Tensor] | None = None
    codec: Codec = field(default_factory=Codec)
    device: torch.device | None = None
    classes: Sequence[int] | None = None

    def measure(self, x_0: Tensor, conditions: Conditions) -> Observation:
        """Measure samples x_0 (n, *), equally many for each condition in turn, in batches: images may be large."""
        group = conditions.spread(len(x_0))
        number, c = self.numbers(conditions)[group], conditions.cond_of(group).get("c", group)
        return Observation.cat(
            [
                self.measure_batch(x_0[rows].to(self.device), number[rows], c[rows])
                for rows in parts(len(x_0), self.codec.batch)
            ]
        )

    def numbers(self, conditions: Conditions) -> Tensor:
        """Return the number that reader and judges have for each condition (G,); all −1 if some are unknown to them."""
        if self.classes is None or "c" not in conditions.cond:
            return torch.arange(conditions.groups)
        number_of = {c: i for i, c in enumerate(self.classes)}
        numbers = torch.tensor([number_of.get(c, -1) for c in conditions.cond["c"].tolist()])
        return numbers if (numbers >= 0).all() else torch.full_like(numbers, -1)

    def groups_of(self, number: Tensor, conditions: Conditions) -> Tensor:
        """Return which of the G conditions reader and judges number so (n,); −1 where it is none of them."""
        same = number[:, None] == self.numbers(conditions)
        return torch.where(same.any(1), same.int().argmax(1), -1)

    def measure_batch(self, x_0: Tensor, number: Tensor, c: Tensor | None = None) -> Observation:
        """Measure samples (n, *) of conditions by their numbers (n,) in one batch.

        `c` (n,) are the prior's classes, which rulers and a judge that is given the embedding of c need; None for those
        that the numbers stand for.
        """
        images = self.codec.decode(x_0)
        if c is None and self.classes is not None:
            c = torch.tensor(self.classes)[number]
        judge_labels = {}
        for name, judge in self.judges.items():
            condition = [c if isinstance(judge, Embedded) and c is not None else number] if judge.conditional else []
            log_p = judge.log_prob(images, *(each.to(images.device) for each in condition))
            judge_labels[name] = log_p.argmax(1).cpu()
        labels = {**judge_labels, **{name: ruler(images.cpu(), c) for name, ruler in self.rulers.items()}}
        reader = self.reader if bool((number >= 0).all()) else None
        adheres = (reader.log_prob(images).argmax(1).cpu() == number).float() if reader else None
        outside = self.outside and self.outside(x_0, images).float().cpu()
        return Observation(labels, judge_labels, self.features(images).cpu(), adheres, outside)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features (n, F) of images: the reader's, or pixels, of large images averages of them."""
        if self.reader:
            return self.reader.features(x)
        size = [min(side, MOST_SIDE) for side in x.shape[2:]]
        return (x if [*x.shape[2:]] == size else F.adaptive_avg_pool2d(x, (size[0], size[1]))).flatten(1)
