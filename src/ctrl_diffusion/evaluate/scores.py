"""Score samples: accuracy, adherence to the prior's condition, diversity.

Samples of a policy are scored as they are. The *target*, the score of a perfect learner with this p̂ and γ, is estimated
from prior samples weighted by w = p̂(y | x_0)^γ, normalised per (c, y). Of a pair that too few of them have it is not
known (NaN): such a pair is left out of the means. A sample whose y could not be measured, NULL, has no y: it counts as
one that is not right, and in no class.

Samples are drawn pair by pair, equally many, so the variance of a mean is that within the pairs. The K labels of one c
share its prior samples: the influence of each on the target is summed over y before it is squared. Where the c are a
sample of a population, every error is clustered by c instead (`clusters`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..control.conditions import Conditions
from ..data.labels import Labels
from ..system.files import finite_or_none
from .certificate import even_shares, shared_error
from .clusters import cluster_error, clusters_of
from .judge import Observation


@dataclass(kw_only=True)
class Figures:
    """Hold the figures of any samples by the names metrics.json uses, uniform means over pairs (c, y)."""

    accuracy: float  # share of samples that have y; of several controls, every y
    accuracy_stderr: float
    judge_accuracy: float | None = None  # the same by the judge
    class_accuracy: float | None = None  # share read as the condition c that was asked for
    diversity: float  # mean distance of the features of two samples of a pair
    outside_support: float | None = None  # share outside the region p̂ was fitted on


@dataclass(kw_only=True)
class Score(Figures):
    """Hold the figures of samples with what they are drawn and compared from."""

    confusion: Tensor  # (K, K), in row y the shares of each label among the samples of y
    macro_f1: float | None = None  # mean F1 score over labels
    outside_stderr: float | None = None
    accuracy_of: dict[str, float] = field(default_factory=dict)  # of each control by itself
    stderr_of: dict[str, float] = field(default_factory=dict)  # of `accuracy_of`, of samples that share nothing
    judge_accuracy_of: dict[str, float] = field(default_factory=dict)
    labels: Labels = field(default_factory=dict)  # (n,), of every control that is measured, asked for or not
    diversities: Tensor = field(default_factory=lambda: torch.empty(0))  # (G · K,), NaN where it is not known

    def metrics(self) -> dict[str, float | None]:
        """Return the figures alone, None for those that are not known."""
        figures: dict[str, float | None]
        figures = finite_or_none({figure.name: getattr(self, figure.name) for figure in fields(Figures)})
        return figures


@dataclass
class Nulled:
    """Compare the classes (K_i,) of a control that was null on samples of the prior, the target and the policy.

    The policy's should be the target's, since y may go with the labels of other controls; the prior's is for no label.
    """

    shares: dict[str, Tensor]  # "prior", "target", "ctrl" → share of each class, averaged over pairs
    stderr: dict[str, Tensor]  # of the shares

    @classmethod
    def from_labels(
        cls, labels: dict[str, Tensor], classes: int, table: Tensor, known: Tensor | None = None, clusters: int = 1
    ) -> "Nulled":
        """Count classes (n,) of "prior", "target" and "ctrl" samples; `table` (G, M, K): the prior samples' rewards.

        The target's are of the pairs that are `known` (G, K); None for all. Errors are clustered by `clusters_of` the
        conditions.
        """
        groups, members, pairs = table.shape
        known = torch.ones(groups, pairs, dtype=torch.bool) if known is None else known
        of_target = labels["target"].view(groups, members)
        counts = {"target": target_shares(of_target, classes, table.softmax(1), known, clusters)}
        for kind in ("prior", "ctrl"):
            counts[kind] = class_shares(labels[kind].view(groups * pairs, -1), classes, clusters)
        shares, stderr = ({kind: count[i] for kind, count in counts.items()} for i in range(2))
        return cls(shares, stderr)

    def stderrs_from(self, kind: str) -> float:
        """Return the largest difference of a class's share from the prior's or the target's, in standard errors.

        These are of independent samples. Drawn conditions are shared by all three, and such an error is too large.
        """
        error = torch.hypot(self.stderr["ctrl"], self.stderr[kind]).clamp(min=1e-12)
        return float(((self.shares["ctrl"] - self.shares[kind]).abs() / error).max())

    def metrics(self) -> dict[str, Any]:
        """Return the figures by the names metrics.json uses."""
        lists = {name: {kind: t.tolist() for kind, t in value.items()} for name, value in vars(self).items()}
        distances = {f"stderrs_from_{kind}": self.stderrs_from(kind) for kind in ("prior", "target")}
        figures: dict[str, Any] = finite_or_none({**lists, **distances})
        return figures


def weighted_diversity(features: Tensor, weights: Tensor) -> Tensor:
    """Compute the mean distance of two different samples drawn by weight.

    From features (G, M, F) and weights (G, M, K), each column summing to 1 over M, it is
    Σ_{i≠j} w_i w_j ‖f_i − f_j‖ / Σ_{i≠j} w_i w_j (G, K).
    """
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    total = (weights * (distances @ weights)).sum(1)
    # one sample that has all the weight has no partner: its diversity is 0, not 0/0
    return total / (1 - weights.square().sum(1)).clamp(min=1e-6)


def score_target(prior: Observation, table: Tensor, conditions: Conditions, known: Tensor | None = None) -> Score:
    """Score the target from M prior samples for each of G conditions in turn, and their rewards (G, M, K).

    Pairs that are not `known` (G, K) are left out; None for all.
    """
    groups, members, classes = table.shape
    known = torch.ones(groups, classes, dtype=torch.bool) if known is None else known
    w, share = table.softmax(1), even_shares(known).to(table)

    def hits(labels: Labels) -> dict[str, Tensor]:
        """Return whether a sample has the class of each control that label k stands for: (G, M, K) of 0 and 1."""
        targets = zip(conditions.controls, conditions.combinations.unbind(1), strict=True)
        return {name: (labels[name].view(groups, members, 1) == y).to(w) for name, y in targets if name in labels}

    def mean(hit: Tensor) -> float:
        return float((w * hit.view(groups, members, -1)).sum(1)[known].mean())

    right = hits(prior.labels)
    accuracy = (w * (hit := all_of(right))).sum(1, keepdim=True)  # (G, 1, K)
    label = one_hot(conditions.label_of(prior.labels), classes).to(w).view(groups, members, classes)
    diversities = weighted_diversity(prior.features.view(groups, members, -1), w)
    confusions = torch.einsum("gmk,gmj->gkj", w, label)
    within = shared_error(members * w * (hit - accuracy), share) if known.any() else torch.nan
    return score(
        prior, right, hits(prior.judge_labels), mean,
        accuracy=mean(hit),
        accuracy_stderr=cluster_error(accuracy, clusters_of(conditions), within, known),
        diversity=float(diversities[known].mean()),
        diversities=torch.where(known, diversities, torch.nan).flatten(),
        confusion=torch.where(known[..., None], confusions, torch.nan).nanmean(0),
    )  # fmt: skip


def stratified_error(values: Tensor, pairs: int, clusters: int = 1) -> float:
    """Return the standard error of the mean of values (P · n,), n of each of P pairs in turn.

    It is that within the pairs, or that of several `clusters` which they fall into. A single one of each pair shows no
    spread within it: that of all values, which is larger, takes its place.
    """
    by_pair = values.view(1 if len(values) == pairs else pairs, -1)
    within = float((by_pair.var(1) / by_pair.shape[1]).sum().sqrt()) / len(by_pair)
    return cluster_error(values, clusters, within)


def score_samples(samples: Observation, conditions: Conditions) -> Score:
    """Score P · n samples, n for each pair (c, y) in turn."""
    from sklearn.metrics import confusion_matrix, f1_score

    pair = conditions.all(len(samples.features) // conditions.pairs)
    targets, _ = conditions.of(pair)
    features = samples.features.view(conditions.pairs, -1, samples.features.shape[1])
    even = torch.full((*features.shape[:2], 1), 1 / features.shape[1])

    def hits(labels: Labels) -> dict[str, Tensor]:
        return {name: (labels[name] == y).float() for name, y in targets.items() if name in labels}

    hit, outside = all_of(right := hits(samples.labels)), samples.outside
    labels, classes = (pair % conditions.classes, conditions.label_of(samples.labels)), range(conditions.classes)
    strata = conditions.pairs, clusters_of(conditions)
    diversities = weighted_diversity(features, even)
    return score(
        samples, right, hits(samples.judge_labels), lambda hit: float(hit.mean()),
        accuracy=float(hit.mean()),
        accuracy_stderr=stratified_error(hit, *strata),
        stderr_of={name: stratified_error(hit, *strata) for name, hit in right.items()},
        diversity=float(diversities.mean()),
        diversities=diversities.flatten(),
        confusion=torch.from_numpy(confusion_matrix(*labels, labels=classes) / (len(pair) // len(classes))),
        macro_f1=float(f1_score(*labels, labels=classes, average="macro", zero_division=0.0)),
        outside_stderr=None if outside is None else stratified_error(outside, *strata),
    )  # fmt: skip


def score(
    observation: Observation, right: Labels, judged: Labels, mean: Callable[[Tensor], float], **figures: Any
) -> Score:
    """Add to the figures those that are means of 0 and 1: of hits by ruler and judge, of adherence, of outside."""
    return Score(
        class_accuracy=None if observation.adheres is None else mean(observation.adheres),
        judge_accuracy=mean(all_of(judged)) if len(judged) == len(right) else None,
        outside_support=None if observation.outside is None else mean(observation.outside),
        accuracy_of={name: mean(hit) for name, hit in right.items()},
        judge_accuracy_of={name: mean(hit) for name, hit in judged.items()},
        labels=observation.labels,
        **figures,
    )


def all_of(hits: dict[str, Tensor]) -> Tensor:
    """Return 1 where every control is hit."""
    return torch.stack(list(hits.values())).prod(0)


def one_hot(y: Tensor, classes: int) -> Tensor:
    """Return whether labels (*,) are each of the classes: (*, K) of bool; NULL is none of them."""
    return y[..., None] == torch.arange(classes)


def class_shares(y: Tensor, classes: int, clusters: int) -> tuple[Tensor, Tensor]:
    """Compute each class's share, averaged over pairs, and its standard error (K_i,), from classes (P, n)."""
    hit, pairs = one_hot(y, classes).float(), len(y)
    errors = [stratified_error(hit[..., j].flatten(), pairs, clusters) for j in range(classes)]
    return hit.mean((0, 1)), torch.tensor(errors)


def target_shares(y: Tensor, classes: int, weights: Tensor, known: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Compute them of classes (G, M) that the weights (G, M, K) of each pair share; pairs not `known` do not count."""
    hit, members, share = one_hot(y, classes).to(weights), y.shape[1], even_shares(known).to(weights)
    shares = torch.einsum("gmk,gmj->gkj", weights, hit)
    errors = []
    for j in range(classes):
        within = shared_error(members * weights * (hit[..., j, None] - shares[:, None, :, j]), share)
        errors.append(cluster_error(shares[..., j], clusters, within, known))
    blank = 0.0 if known.any() else torch.nan
    return shares[known].mean(0) + blank, torch.tensor(errors) + blank
