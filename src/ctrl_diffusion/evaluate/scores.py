"""What a control achieves: accuracy, adherence to the prior's condition, diversity.

Samples of a policy are judged as they are; the *target* (what a perfect learner would score with this p̂ and γ) is read
off prior samples weighted by w = p̂(y | x_0)^γ, normalised per (c, y).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, f1_score
from torch import Tensor

from ..control.conditions import Conditions
from ..data.labels import Labels
from .judge import Look


@dataclass
class Score:
    """Uniform means over pairs (c, y); diversity is the mean pairwise feature distance within a pair.

    With several controls `accuracy` counts the samples with which all are right, `each` and `each_by_judge` those with
    which one is. `confusion` (K, K) has in row y the shares of each label among the samples asked for y. `measured` is
    what every control that is judged came out as, asked for or not: (n,) classes.
    `outside` is the share that lies outside the region p̂ was fitted on.
    """

    accuracy: float
    accuracy_stderr: float
    class_accuracy: float | None
    diversity: float
    confusion: Tensor
    judge_accuracy: float | None = None
    macro_f1: float | None = None
    outside: float | None = None
    outside_stderr: float | None = None
    each: dict[str, float] = field(default_factory=dict)
    each_by_judge: dict[str, float] = field(default_factory=dict)
    measured: Labels = field(default_factory=dict)


@dataclass
class Nulled:
    """How often each class of a control came (K_i,) that was not asked for, averaged over pairs, and standard errors.

    What should have come is the target's share: y may go with the labels that were asked for. The prior's is what came
    when nothing at all was asked.
    """

    shares: dict[str, Tensor]
    stderr: dict[str, Tensor]

    @classmethod
    def of(cls, measured: dict[str, Tensor], classes: int, table: Tensor) -> "Nulled":
        """From what was measured (n,) on "prior", "target" and "ctrl" samples; `table` (G, M, K): its rewards."""
        groups, members, labels = table.shape
        weights = table.softmax(1).transpose(1, 2).flatten(0, 1)  # (G · K, M)
        of_pairs = measured["target"].view(groups, 1, members).expand(-1, labels, -1).flatten(0, 1)
        found = {"target": class_shares(of_pairs, classes, weights)}
        for kind in ("prior", "ctrl"):
            y = measured[kind].view(groups * labels, -1)
            found[kind] = class_shares(y, classes, torch.full(y.shape, 1 / y.shape[1]))
        return cls({kind: f[0] for kind, f in found.items()}, {kind: f[1] for kind, f in found.items()})

    def away_from(self, kind: str) -> float:
        """The largest difference of a class's share from the prior's or the target's, in standard errors."""
        error = torch.hypot(self.stderr["ctrl"], self.stderr[kind]).clamp(min=1e-12)
        return float(((self.shares["ctrl"] - self.shares[kind]).abs() / error).max())


def weighted_diversity(features: Tensor, weights: Tensor) -> Tensor:
    """Mean distance of two different samples drawn by weight.

    Args:
        features: (G, M, F).
        weights: (G, M, K), each column summing to 1 over M.

    Returns:
        (G, K): Σ_{i≠j} w_i w_j ‖f_i − f_j‖ / Σ_{i≠j} w_i w_j.
    """
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    total = (weights * (distances @ weights)).sum(1)
    # one sample that owns all the weight has no partner: its diversity is 0, not 0/0
    return total / (1 - weights.square().sum(1)).clamp(min=1e-6)


def score_target(look: Look, table: Tensor, conditions: Conditions) -> Score:
    """The target's score.

    Args:
        look: at prior samples, M for each of G conditions in turn.
        table: (G, M, K), their rewards.
        conditions: the pairs.
    """
    groups, members, classes = table.shape
    w = table.softmax(1)

    def hits(found: Labels) -> dict[str, Tensor]:
        """Whether a sample has what label k asks of each control: (G, M, K) of 0 and 1."""
        asked = zip(conditions.controls, conditions.combinations.unbind(1), strict=True)
        return {name: (found[name].view(groups, members, 1) == y).to(w) for name, y in asked if name in found}

    def mean(hit: Tensor) -> float:
        return float((w * hit).sum(1).mean())

    each, by_judge = hits(look.measured), hits(look.seen)
    came = all_of(each)
    accuracy = (w * came).sum(1, keepdim=True)  # (G, 1, K)
    label = F.one_hot(conditions.label_of(look.measured), classes).to(w).view(groups, members, classes)
    adheres, outside = look.adheres, look.outside
    return Score(
        accuracy=float(accuracy.mean()),
        # of a ratio of weighted sums, pair by pair
        accuracy_stderr=float((w * (came - accuracy)).square().sum().sqrt() / (groups * classes)),
        class_accuracy=None if adheres is None else mean(adheres.view(groups, members, 1)),
        diversity=float(weighted_diversity(look.features.view(groups, members, -1), w).mean()),
        confusion=torch.einsum("gmk,gmj->gkj", w, label).mean(0),
        judge_accuracy=mean(all_of(by_judge)) if len(by_judge) == len(each) else None,
        each={name: mean(hit) for name, hit in each.items()},
        each_by_judge={name: mean(hit) for name, hit in by_judge.items()},
        measured=look.measured,
        outside=None if outside is None else mean(outside.view(groups, members, 1)),
    )


def score_samples(look: Look, conditions: Conditions) -> Score:
    """The score of P · n samples that were looked at, n for each pair (c, y) in turn."""
    pair = conditions.all(len(look.features) // conditions.pairs)
    (asked, _), measured, seen = conditions.of(pair), look.measured, look.seen
    features = look.features.view(conditions.pairs, -1, look.features.shape[1])
    even = torch.full((*features.shape[:2], 1), 1 / features.shape[1])
    each = {name: (measured[name] == y).float() for name, y in asked.items()}
    by_judge = {name: (seen[name] == y).float() for name, y in asked.items() if name in seen}
    right, adheres, outside = all_of(each), look.adheres, look.outside
    labels = pair % conditions.classes, conditions.label_of(measured)
    return Score(
        accuracy=float(right.mean()),
        accuracy_stderr=float(right.std() / len(right) ** 0.5),
        class_accuracy=None if adheres is None else float(adheres.mean()),
        diversity=float(weighted_diversity(features, even).mean()),
        confusion=torch.from_numpy(confusion_matrix(*labels, labels=range(conditions.classes), normalize="true")),
        judge_accuracy=float(all_of(by_judge).mean()) if len(by_judge) == len(each) else None,
        macro_f1=float(f1_score(*labels, average="macro", zero_division=0.0)),
        each={name: float(hit.mean()) for name, hit in each.items()},
        each_by_judge={name: float(hit.mean()) for name, hit in by_judge.items()},
        measured=measured,
        outside=None if outside is None else float(outside.mean()),
        outside_stderr=None if outside is None else float(outside.std() / len(outside) ** 0.5),
    )


def all_of(hits: dict[str, Tensor]) -> Tensor:
    """1 where every control is hit."""
    return torch.stack(list(hits.values())).prod(0)


def class_shares(y: Tensor, classes: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    """How often each class came, averaged over pairs, and its standard error.

    Args:
        y: (P, n), what came, n samples for each pair.
        classes: of the control.
        weights: (P, n), each row summing to 1.
    """
    came = F.one_hot(y, classes).to(weights)
    shares = (weights[..., None] * came).sum(1, keepdim=True)
    variance = (weights[..., None] * (came - shares)).square().sum((0, 1))
    return shares.mean((0, 1)), variance.sqrt() / len(y)
