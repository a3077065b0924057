"""Say what y an image has: by a ruler, or by a judge fitted on other labels."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain.codec import Codec
from ..chain.rows import parts, rows_of
from ..control.conditions import Conditions
from ..data.labels import Labels
from ..reward.scorer import Classifier, Scorer

Ruler = Callable[[Tensor], Tensor]
MOST_SIDE = 32  # of images whose pixels are compared


@dataclass
class SecondOpinion:
    """How samples are judged.

    Args:
        rulers: control → x (n, C, H, W) → the class of y (n,): the measure that made the labels; where there is none,
            `seconds` has the say.
        reader: reads which of the prior's conditions it is; its features measure diversity. Without one, adherence is
            not judged and diversity is measured in pixels.
        seconds: control → a classifier of y that p̂ never met, whose opinion stands beside the ruler's.
        outside: samples (n, *) and their images (n, C, H, W) → whether each lies outside the region some p̂ was
            fitted on (n,).
        codec: turns samples (n, *) into images.
        device: where the classifiers are.
    """

    rulers: dict[str, Ruler]
    reader: Classifier | None = None
    seconds: dict[str, Scorer] = field(default_factory=dict)
    outside: Callable[[Tensor, Tensor], Tensor] | None = None
    codec: Codec = field(default_factory=Codec)
    device: torch.device | None = None

    def look_at(self, x_0: Tensor, conditions: Conditions) -> "Look":
        """Look at samples x_0 (n, *), equally many for each condition in turn, a few at a time: images may be large."""
        group = torch.arange(len(x_0)) * conditions.groups // len(x_0)
        few = parts(len(x_0), self.codec.batch)
        return Look.joined([self.look_at_once(x_0[rows].to(self.device), group[rows]) for rows in few])

    def look_at_once(self, x_0: Tensor, group: Tensor) -> "Look":
        """Look at samples (n, *) of conditions (n,) all at once."""
        images = self.codec.decode(x_0)
        measured, seen = self.measure(images, group)
        adheres = self.reader and (self.reader.log_prob(images).argmax(1).cpu() == group).float()
        outside = self.outside and self.outside(x_0, images).float().cpu()
        return Look(measured, seen, self.features(images).cpu(), adheres, outside)

    def features(self, x: Tensor) -> Tensor:
        """What diversity is measured in: (n, F); without a reader pixels, of large images averages of them."""
        if self.reader:
            return self.reader.features(x)
        small = [min(side, MOST_SIDE) for side in x.shape[2:]]
        return (x if [*x.shape[2:]] == small else F.adaptive_avg_pool2d(x, small)).flatten(1)

    def measure(self, x: Tensor, group: Tensor) -> tuple[Labels, Labels]:
        """The class of every y of each x of a condition (n,) that counts, and those the second classifiers see."""
        seen = {}
        for name, second in self.seconds.items():
            given = (group.to(x.device),) if second.conditional else ()
            seen[name] = second.log_prob(x, *given).argmax(1).cpu()
        return {**seen, **{name: ruler(x.cpu()) for name, ruler in self.rulers.items()}}, seen


@dataclass
class Look:
    """What a judge saw of n samples: the classes of y, those in the eyes of the second classifiers, features (n, F),
    whether each is read as its condition (n,) and lies outside the region p̂ was fitted on (n,), both of 0 and 1."""

    measured: Labels
    seen: Labels
    features: Tensor
    adheres: Tensor | None
    outside: Tensor | None

    def __getitem__(self, rows: Tensor) -> "Look":
        one = (None if t is None else t[rows] for t in (self.features, self.adheres, self.outside))
        return Look(rows_of(self.measured, rows), rows_of(self.seen, rows), *one)

    @classmethod
    def joined(cls, looks: "list[Look]") -> "Look":
        """Looks at some samples as a look at all."""
        first = looks[0]
        labels = (
            {name: torch.cat([getattr(look, kind)[name] for look in looks]) for name in getattr(first, kind)}
            for kind in ("measured", "seen")
        )
        others = (
            None if getattr(first, kind) is None else torch.cat([getattr(look, kind) for look in looks])
            for kind in ("features", "adheres", "outside")
        )
        return cls(*labels, *others)
