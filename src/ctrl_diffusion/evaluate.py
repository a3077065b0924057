"""What a control achieves: accuracy, adherence to the prior's condition, diversity, distance to the real data.

Samples of a policy are judged as they are; the *target* (what a perfect learner would score with this p̂ and γ) is read
off prior samples weighted by w = p̂(y | x_0)^γ, normalised per (c, y).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, f1_score
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from .certificate import Certificate
from .classifier import Classifier, Scorer
from .conditions import Conditions

Ruler = Callable[[Tensor], Tensor]


@dataclass
class Judge:
    """How samples are judged.

    Args:
        ruler: x (n, C, H, W) → the class of y (n,): the measure that made the labels; None asks `second` instead.
        reader: reads which of the prior's conditions it is; its features measure diversity. Without one, adherence is
            not judged and diversity is measured in pixels.
        second: a classifier of y that p̂ never met, whose opinion stands beside the ruler's.
        outside: x (n, C, H, W) → whether each lies outside the region p̂ was fitted on (n,).
    """

    ruler: Ruler | None
    reader: Classifier | None = None
    second: Scorer | None = None
    outside: Callable[[Tensor], Tensor] | None = None

    def features(self, x: Tensor) -> Tensor:
        """What diversity is measured in: (n, F)."""
        return x.flatten(1) if self.reader is None else self.reader.features(x)

    def adheres(self, x: Tensor, group: Tensor) -> Tensor | None:
        """Whether each x (n, C, H, W) is read as its condition (n,): (n,) of 0 and 1."""
        return None if self.reader is None else (self.reader.log_prob(x).argmax(1) == group).to(x)

    def measure(self, x: Tensor, group: Tensor) -> tuple[Tensor, Tensor | None]:
        """The class of y (n,) of each x of a condition (n,) that counts, and the one the second classifier sees."""
        given = (group,) if self.second is not None and self.second.conditional else ()
        seen = None if self.second is None else self.second.log_prob(x, *given).argmax(1)
        return seen if self.ruler is None else self.ruler(x), seen


@dataclass
class Score:
    """Uniform means over pairs (c, y); diversity is the mean pairwise feature distance within a pair.

    `confusion` (K, K) has in row y the shares of each class among the samples asked for y. `outside` is the share that
    lies outside the region p̂ was fitted on.
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


@dataclass
class Evaluation:
    """The prior, the target and the policy judged alike, and the certificate; n paths of the policy."""

    prior: Score
    target: Score
    ctrl: Score
    certificate: Certificate
    n: int

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
                "objective_nats": gap.objective,
                "objective_stderr": gap.objective_stderr,
                "log_z_nats": gap.log_z,
                "log_z_stderr": gap.log_z_stderr,
                "log_z_policy_nats": gap.log_z_policy,
                "log_z_policy_stderr": gap.log_z_policy_stderr,
                "gap_nats": gap.gap,
                "gap_stderr": gap.stderr,
                "ess_fraction": gap.ess,
                "ess_prior_fraction": gap.ess_prior,
                # one entry per (c, y), y running fastest
                "pairs": {
                    "objective_nats": gap.objective_pairs.tolist(),
                    "objective_stderr": gap.objective_stderr_pairs.tolist(),
                    "log_z_nats": gap.log_z_pairs.tolist(),
                    "log_z_stderr": gap.log_z_stderr_pairs.tolist(),
                    "log_z_policy_nats": gap.log_z_policy_pairs.tolist(),
                    "log_z_policy_stderr": gap.log_z_policy_stderr_pairs.tolist(),
                    "gap_nats": gap.gap_pairs.tolist(),
                    "gap_stderr": gap.stderr_pairs.tolist(),
                    "ess_fraction": gap.ess_pairs.tolist(),
                },
            },
        }


def warn_if_left(prior: Score, ctrl: Score) -> None:
    """Warn if the policy has moved to where nothing was labelled.

    Raises:
        RuntimeWarning: more than twice the prior's share lies outside, and more by three standard errors.
    """
    if prior.outside is None or ctrl.outside is None:
        return
    error = math.hypot(prior.outside_stderr, ctrl.outside_stderr)
    if ctrl.outside > max(2 * prior.outside, prior.outside + 3 * error):
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


def score_target(x_0: Tensor, table: Tensor, judge: Judge) -> Score:
    """The target's score.

    Args:
        x_0: (G · M, *), prior samples, M for each condition in turn.
        table: (G, M, K), their rewards.
        judge: of y and c.
    """
    groups, members, classes = table.shape
    w = table.softmax(1)

    def one_hot(y: Tensor) -> Tensor:
        return F.one_hot(y, classes).to(w).view(groups, members, classes)

    group = torch.arange(groups).repeat_interleave(members)
    measured, seen = judge.measure(x_0, group)
    came = one_hot(measured)
    confusion = torch.einsum("gmk,gmj->gkj", w, came)
    accuracy = confusion.diagonal(dim1=1, dim2=2)[:, None]  # (G, 1, K)
    adheres = judge.adheres(x_0, group)
    diversity = weighted_diversity(judge.features(x_0).view(groups, members, -1), w)
    return Score(
        accuracy=float(accuracy.mean()),
        # of a ratio of weighted sums, pair by pair
        accuracy_stderr=float((w * (came - accuracy)).square().sum().sqrt() / (groups * classes)),
        class_accuracy=None if adheres is None else float((w * adheres.view(groups, members, 1)).sum(1).mean()),
        diversity=float(diversity.mean()),
        confusion=confusion.mean(0),
        judge_accuracy=None if seen is None else float((w * one_hot(seen)).sum(1).mean()),
        outside=judge.outside and float((w * judge.outside(x_0).to(w).view(groups, members, 1)).sum(1).mean()),
    )


def score_samples(x_0: Tensor, conditions: Conditions, judge: Judge) -> Score:
    """The score of samples x_0 (P · n, *), n for each pair (c, y) in turn."""
    pair = conditions.all(len(x_0) // conditions.pairs)
    y, group = pair % conditions.classes, conditions.group_of(pair)
    measured, seen = judge.measure(x_0, group)
    features = judge.features(x_0).view(conditions.pairs, -1, judge.features(x_0[:1]).shape[1])
    even = torch.full((*features.shape[:2], 1), 1 / features.shape[1])
    outside = judge.outside and judge.outside(x_0).float()
    right, adheres = (measured == y).float(), judge.adheres(x_0, group)
    return Score(
        accuracy=float(right.mean()),
        accuracy_stderr=float(right.std() / len(right) ** 0.5),
        class_accuracy=None if adheres is None else float(adheres.mean()),
        diversity=float(weighted_diversity(features, even).mean()),
        confusion=torch.from_numpy(confusion_matrix(y, measured, labels=range(conditions.classes), normalize="true")),
        judge_accuracy=None if seen is None else float((seen == y).float().mean()),
        macro_f1=float(f1_score(y.numpy(), measured.numpy(), average="macro", zero_division=0.0)),
        outside=None if outside is None else float(outside.mean()),
        outside_stderr=None if outside is None else float(outside.std() / len(outside) ** 0.5),
    )


class _Features(nn.Module):
    """The reader's features in the form torchmetrics asks for."""

    def __init__(self, reader: Classifier) -> None:
        super().__init__()
        self.reader = reader
        self.num_features = reader.score.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.reader.features(x)


def frechet_distance(real: Tensor, samples: Tensor, reader: Classifier) -> float:
    """Fréchet distance (Heusel et al. 2017) between two sets of x (n, C, H, W) in the reader's feature space."""
    metric = FrechetInceptionDistance(feature=_Features(reader), input_img_size=tuple(real.shape[1:]), normalize=True)
    metric.update(real, real=True)
    metric.update(samples, real=False)
    return float(metric.compute())


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance in pixels of each x (n, *) to its nearest neighbour in the reference (m, *): (n,)."""
    return torch.cdist(x.flatten(1), reference.flatten(1)).min(1).values


def energy_test(
    x: Tensor, y: Tensor, permutations: int = 200, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Whether two samples (n, *) and (m, *) come from one distribution (Székely & Rizzo 2004).

    Returns:
        The energy distance 2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖ (V-statistic, so never negative), and the share of random
        relabellings, the given one among them, that make it at least as large: small if the distributions differ.
    """
    both, n = torch.cat([x, y]).flatten(1).double(), len(x)
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    labels = torch.stack(
        [torch.arange(len(both)), *(torch.randperm(len(both), generator=generator) for _ in range(permutations))]
    )
    # weights 1/n on one sample and −1/m on the other: the distance is −wᵀ D w
    w = torch.where(labels < n, 1 / n, -1 / len(y)).double().mT
    found = -(w * (distances @ w)).sum(0)
    return float(found[0]), float((found >= found[0]).double().mean())
