"""Turn a network's raw scores into p̂ of a label: a class, one of ordered classes, or a place on a scale.

A new kind of label is a subclass of `Head` and a row of HEADS, which a package elsewhere may add.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical as Distribution
from torch.distributions import Normal

from ..data.labels import LabelSpace
from ..data.names import is_number

# in levels: no place is asked for more exactly. Labels without noise would otherwise make p̂ a needle
RESOLUTION = 0.25


class Head:
    """Read raw scores (B, outputs) as p̂ of one of K classes, 0 … K − 1."""

    name: ClassVar[str]
    outputs: ClassVar[int | None] = None  # scores of each x; None for K
    scale: ClassVar[bool] = False  # whether y is a place between levels 0 … K − 1
    bound: ClassVar[float] = 0.0  # no log p̂ is larger, in nats: a probability is at most 1, a density may exceed it

    def __init__(self, classes: int) -> None:
        self.classes = classes

    @classmethod
    def suits(cls, space: LabelSpace) -> bool:
        """Return whether to try this head on such labels where the settings leave it open."""
        return space.scale == cls.scale

    def weights(self) -> dict[str, Tensor]:
        """Return what is fitted beside the network, by name, as it is before the fit."""
        return {}

    def log_prob(self, score: Tensor, temperature: Tensor | float, **weights: Tensor) -> Tensor:
        """Return log p̂ (B, K) in nats at every class or level."""
        raise NotImplementedError

    def density(self, score: Tensor, temperature: Tensor | float) -> Normal | None:
        """Return p̂'s density (B,) over the scale; None if y is a class."""
        return None

    def nll(
        self, score: Tensor, temperature: Tensor | float, y: Tensor, reduction: str = "none", **weights: Tensor
    ) -> Tensor:
        """Return −log p̂ in nats at labels y (B,): (B,), or () by the reduction "sum" or "mean"."""
        return F.nll_loss(self.log_prob(score, temperature, **weights), y, reduction=reduction)

    def figures(self, log_prob: Tensor, density: Normal | None, y: Tensor, c: Tensor | None) -> dict[str, float | None]:
        """Measure log p̂ (n, K), or its density (n,), at labels y (n,): the rest of a `ClassifierReport`."""
        from torchmetrics.functional.classification import multiclass_auroc, multiclass_calibration_error

        p, counts = log_prob.exp(), y.bincount(minlength=self.classes)
        chance = float(Distribution(probs=counts / len(y)).entropy())
        if c is not None:
            groups = [c == group for group in c.unique()]
            chance = sum(guess_nll(y[group], self.classes) * float(group.float().mean()) for group in groups)
        return {
            "accuracy": float((log_prob.argmax(1) == y).float().mean()),
            "ece": float(multiclass_calibration_error(p, y, num_classes=self.classes, n_bins=10)),
            "chance_nll": chance,
            "brier": float((p - F.one_hot(y, self.classes)).square().sum(1).mean()),
            "auroc": float(multiclass_auroc(p, y, num_classes=self.classes)) if 0 < counts.min() < len(y) else None,
        }


class Categorical(Head):
    """Read K logits."""

    name = "categorical"

    def log_prob(self, score: Tensor, temperature: Tensor | float, **weights: Tensor) -> Tensor:
        return F.log_softmax(score / temperature, dim=1)


class Ordinal(Head):
    """Read one score s of ordered classes (McCullagh 1980): P(y > k) = σ((s − b_k) / T), K − 1 increasing cuts b."""

    name, outputs = "ordinal", 1

    @classmethod
    def suits(cls, space: LabelSpace) -> bool:
        """Return whether there are three or more classes whose names are numbers, hence in order."""
        return not space.scale and space.size > 2 and all(map(is_number, space.values))

    def weights(self) -> dict[str, Tensor]:
        return {"first_cut": torch.tensor(-1.0), "log_gaps": torch.zeros(self.classes - 2)}

    def log_prob(self, score: Tensor, temperature: Tensor | float, **weights: Tensor) -> Tensor:
        first_cut, log_gaps = weights["first_cut"], weights["log_gaps"]
        cuts = torch.cat([first_cut[None], first_cut + log_gaps.exp().cumsum(0)])
        above = (score - cuts) / temperature  # logits of y > k
        # log(σ(a) − σ(b)) for a > b, as log σ(a) + log σ(−b) + log(1 − e^(b − a)): exact far in the tails
        tops, bottoms = F.logsigmoid(above), F.logsigmoid(-above)
        between = tops[:, :-1] + bottoms[:, 1:] + torch.log(-torch.expm1(above[:, 1:] - above[:, :-1]))
        return torch.cat([bottoms[:, :1], between, tops[:, -1:]], dim=1)


class Gaussian(Head):
    """Read mean and log standard deviation of y on a scale, in levels (Nix & Weigend 1994); T scales the deviation."""

    name, outputs, scale = "gaussian", 2, True
    bound = -math.log(RESOLUTION * math.sqrt(2 * math.pi))  # at the mean, of the least deviation there is: 0.47 nats

    def density(self, score: Tensor, temperature: Tensor | float) -> Normal:
        # beyond e^±5 levels no deviation is believable, and its square would overflow
        std = temperature * score[:, 1].clamp(-5, 5).exp()
        return Normal(score[:, 0], (std.square() + RESOLUTION**2).sqrt(), validate_args=False)

    def log_prob(self, score: Tensor, temperature: Tensor | float, **weights: Tensor) -> Tensor:
        levels: Tensor = self.density(score, temperature).log_prob(torch.arange(self.classes).to(score)[:, None])
        return levels.T

    def nll(
        self, score: Tensor, temperature: Tensor | float, y: Tensor, reduction: str = "none", **weights: Tensor
    ) -> Tensor:
        losses: Tensor = -self.density(score, temperature).log_prob(y)
        return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()

    def figures(self, log_prob: Tensor, density: Normal | None, y: Tensor, c: Tensor | None) -> dict[str, float | None]:
        from sklearn.metrics import r2_score

        assert density is not None
        nominal, empirical = coverage(density, y)
        nearest, true = (place.round().clamp(0, self.classes - 1) for place in (density.mean, y))
        return {
            "accuracy": float((nearest == true).float().mean()),
            "ece": float((nominal - empirical).abs().mean()),
            "chance_nll": float(Normal(y.mean(), y.std()).entropy()),
            "brier": None,
            "auroc": None,
            "r2": r2_score(y.numpy(), density.mean.numpy()),
        }


HEADS: dict[str, type[Head]] = {head.name: head for head in (Categorical, Ordinal, Gaussian)}


def guess_nll(y: Tensor, classes: int) -> float:
    """Return the NLL in nats of the best guess of y (n,) without x: the entropy, its bias corrected (Miller 1955)."""
    counts = y.bincount(minlength=classes)
    return float(Distribution(probs=counts / len(y)).entropy()) + (int((counts > 0).sum()) - 1) / (2 * len(y))


def coverage(density: Normal, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the central intervals of 10 … 90 %, and the share of y (n,) that each holds: two (9,)."""
    nominal = torch.arange(1, 10) / 10
    return nominal, ((2 * density.cdf(y) - 1).abs()[:, None] <= nominal).float().mean(0)
