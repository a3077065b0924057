"""What a control achieves: accuracy, adherence to the prior's condition, diversity.

Samples of a policy are judged as they are; the *target* (what a perfect learner would score with this p̂ and γ) is read
off prior samples weighted by w = p̂(y | x_0)^γ, normalised per (c, y).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, f1_score
from torch import Tensor

from .certificate import Certificate
from .chain.rows import parts, rows_of
from .control.conditions import Conditions
from .data.labels import Labels
from .reward.reward import FEW
from .reward.scorer import Classifier, Scorer

Ruler = Callable[[Tensor], Tensor]
MOST_SIDE = 32  # of images whose pixels are compared
# what metrics.json calls the figures of a certificate
CERTIFIED = {
    "objective_nats": "objective", "objective_stderr": "objective_stderr", "log_z_nats": "log_z",
    "log_z_stderr": "log_z_stderr", "log_z_policy_nats": "log_z_policy", "log_z_policy_stderr": "log_z_policy_stderr",
    "gap_nats": "gap", "gap_stderr": "stderr", "ess_fraction": "ess",
}  # fmt: skip


@dataclass
class Judge:
    """How samples are judged.

    Args:
        rulers: control → x (n, C, H, W) → the class of y (n,): the measure that made the labels; where there is none,
            `seconds` has the say.
        reader: reads which of the prior's conditions it is; its features measure diversity. Without one, adherence is
            not judged and diversity is measured in pixels.
        seconds: control → a classifier of y that p̂ never met, whose opinion stands beside the ruler's.
        outside: samples (n, *) and their images (n, C, H, W) → whether each lies outside the region some p̂ was
            fitted on (n,).
        decode: samples (n, *) → images, of a latent model; None if samples are images.
        device: where the classifiers are.
    """

    rulers: dict[str, Ruler]
    reader: Classifier | None = None
    seconds: dict[str, Scorer] = field(default_factory=dict)
    outside: Callable[[Tensor, Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    device: torch.device | None = None

    def look(self, x_0: Tensor, conditions: Conditions) -> "Look":
        """Look at samples x_0 (n, *), equally many for each condition in turn, a few at a time: images may be large."""
        group = torch.arange(len(x_0)) * conditions.groups // len(x_0)
        few = parts(len(x_0), FEW if self.decode else 1024)
        return Look.joined([self.glance(x_0[rows].to(self.device), group[rows]) for rows in few])

    def glance(self, x_0: Tensor, group: Tensor) -> "Look":
        """Look at samples (n, *) of conditions (n,) all at once."""
        images = self.decode(x_0) if self.decode else x_0
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


@dataclass
class Evaluation:
    """The prior, the target and the policy judged alike, and the certificate; n paths of the policy.

    Of several controls, `parts` has the same with labels for some of them only, by their names, and `nulled` (of such a
    part) what came of the others.
    """

    prior: Score
    target: Score
    ctrl: Score
    certificate: Certificate
    n: int
    nulled: dict[str, Nulled] = field(default_factory=dict)
    parts: dict[tuple[str, ...], "Evaluation"] = field(default_factory=dict)

    @property
    def null_shift(self) -> float:
        """The largest change of another control's accuracy when one control is nulled."""
        return max(
            abs(part.ctrl.each[name] - self.ctrl.each[name])
            for part in self.parts.values()
            if len(part.nulled) == 1
            for name in part.ctrl.each
        )

    def by_control(self) -> dict[str, Any]:
        """The figures of several controls by the names metrics.json uses."""
        out: dict[str, Any] = {
            "all_accuracy": self.ctrl.accuracy,
            "all_target": self.target.accuracy,
            "null_shift": self.null_shift,
        }
        for name in self.ctrl.each:
            alone, without = self.parts[(name,)], next(p for p in self.parts.values() if list(p.nulled) == [name])
            nulled = without.nulled[name]
            out[name] = {
                "accuracy": self.ctrl.each[name],
                "judge_accuracy": self.ctrl.each_by_judge.get(name),
                "target": self.target.each[name],
                "alone": {
                    "accuracy": alone.ctrl.accuracy,
                    "accuracy_stderr": alone.ctrl.accuracy_stderr,
                    "judge_accuracy": alone.ctrl.judge_accuracy,
                    "target": alone.target.accuracy,
                    "class_accuracy": alone.ctrl.class_accuracy,
                    "samples": alone.n,
                    "gap_nats": alone.certificate.gap,
                    "gap_stderr": alone.certificate.stderr,
                },
                "nulled": {
                    "shares": {kind: shares.tolist() for kind, shares in nulled.shares.items()},
                    "stderr": {kind: stderr.tolist() for kind, stderr in nulled.stderr.items()},
                    "stderrs_from_prior": nulled.away_from("prior"),
                    "stderrs_from_target": nulled.away_from("target"),
                },
            }
        return out

    def diversity_ratio(self, score: Score) -> float:
        """A score's diversity relative to the target's."""
        return score.diversity / max(self.target.diversity, 1e-12)

    def metrics(self) -> dict[str, dict]:
        """The figures by the names metrics.json uses."""
        target, ctrl, gap = self.target, self.ctrl, self.certificate

        def shared(score: Score) -> dict[str, float | None]:
            return {
                "accuracy": score.accuracy,
                "accuracy_stderr": score.accuracy_stderr,
                "judge_accuracy": score.judge_accuracy,
                "class_accuracy": score.class_accuracy,
                "diversity": score.diversity,
                "outside_support": score.outside,
            }

        return {
            **({"controls": self.by_control()} if self.parts else {}),
            "prior": shared(self.prior),
            "target": shared(target),
            "ctrl": {
                "samples": self.n,
                **shared(ctrl),
                "macro_f1": ctrl.macro_f1,
                "diversity_ratio": self.diversity_ratio(ctrl),
                "kl_nats": gap.kl,
                "confusion": ctrl.confusion.tolist(),
            },
            "certificate": {
                **{said: getattr(gap, name) for said, name in CERTIFIED.items()},
                "ess_prior_fraction": gap.ess_prior,
                # one entry per (c, y), y running fastest
                "pairs": {said: getattr(gap, f"{name}_pairs").tolist() for said, name in CERTIFIED.items()},
            },
        }


def leaves(share: float, usual: float, error: float) -> bool:
    """Whether a share outside is more than twice the usual one, and more by three standard errors."""
    return share > max(2 * usual, usual + 3 * error)


def warn_if_left(prior: Score, ctrl: Score) -> None:
    """Warn if the policy has moved to where nothing was labelled.

    Raises:
        RuntimeWarning: more than twice the prior's share lies outside, and more by three standard errors.
    """
    if prior.outside is None or ctrl.outside is None:
        return
    error = math.hypot(prior.outside_stderr, ctrl.outside_stderr)
    if leaves(ctrl.outside, prior.outside, error):
        warnings.warn(
            f"samples leave the region the classifier was fitted on ({ctrl.outside:.1%} lie outside, of the prior's "
            f"{prior.outside:.1%}); compare the independent judge.",
            RuntimeWarning,
            stacklevel=2,
        )


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
