"""What a control achieves: accuracy, adherence to the prior's condition, diversity, distance to the real data.

Samples of a policy are judged as they are; the *target* (what a perfect learner would score with this p̂ and γ) is read
off prior samples weighted by w = p̂(y | x_0)^γ, normalised per (c, y).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from .certificate import Certificate
from .classifier import Classifier

Ruler = Callable[[Tensor], Tensor]


@dataclass
class Score:
    """Uniform means over pairs (c, y); diversity is the mean pairwise feature distance within a pair."""

    accuracy: float
    accuracy_stderr: float
    class_accuracy: float
    diversity: float
    macro_f1: float | None = None


@dataclass
class Evaluation:
    """The prior, the target and the policy judged alike, and the certificate; n paths of the policy."""

    prior: Score
    target: Score
    ctrl: Score
    certificate: Certificate
    n: int

    def metrics(self) -> dict[str, dict]:
        """The figures by the names metrics.json uses."""
        target, ctrl, gap = self.target, self.ctrl, self.certificate
        return {
            "prior": {
                "accuracy": self.prior.accuracy,
                "accuracy_stderr": self.prior.accuracy_stderr,
                "class_accuracy": self.prior.class_accuracy,
                "diversity": self.prior.diversity,
            },
            "target": {
                "accuracy": target.accuracy,
                "accuracy_stderr": target.accuracy_stderr,
                "class_accuracy": target.class_accuracy,
                "diversity": target.diversity,
            },
            "ctrl": {
                "samples": self.n,
                "accuracy": ctrl.accuracy,
                "accuracy_stderr": ctrl.accuracy_stderr,
                "macro_f1": ctrl.macro_f1,
                "class_accuracy": ctrl.class_accuracy,
                "diversity_ratio": ctrl.diversity / target.diversity,
                "kl_nats": gap.kl,
            },
            "certificate": {
                "objective_nats": gap.objective,
                "objective_stderr": gap.objective_stderr,
                "log_z_nats": gap.log_z,
                "log_z_stderr": gap.log_z_stderr,
                "log_z_policy_nats": gap.log_z_policy,
                "gap_nats": gap.gap,
                "gap_stderr": gap.stderr,
                "ess_fraction": gap.ess,
                "ess_prior_fraction": gap.ess_prior,
                # one entry per (c, y), y running fastest
                "pairs": {
                    "objective_nats": gap.objective_pairs.tolist(),
                    "log_z_nats": gap.log_z_pairs.tolist(),
                    "gap_nats": (gap.log_z_pairs - gap.objective_pairs).tolist(),
                    "gap_stderr": gap.stderr_pairs.tolist(),
                    "ess_fraction": gap.ess_pairs.tolist(),
                },
            },
        }


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


def score_target(x_0: Tensor, table: Tensor, ruler: Ruler, reader: Classifier) -> Score:
    """The target's score.

    Args:
        x_0: (G · M, *), prior samples, M for each condition in turn.
        table: (G, M, K), their rewards.
        ruler: x → the true class of y.
        reader: reads c; its features measure diversity.
    """
    groups, members, classes = table.shape
    w = table.softmax(1)
    right = (ruler(x_0).view(groups, members, 1) == torch.arange(classes)).to(w)
    read = (reader.log_prob(x_0).argmax(1).view(groups, members) == torch.arange(groups)[:, None]).to(w)
    diversity = weighted_diversity(reader.features(x_0).view(groups, members, -1), w)
    accuracy = (w * right).sum(1, keepdim=True)
    return Score(
        accuracy=float(accuracy.mean()),
        # of a ratio of weighted sums, pair by pair
        accuracy_stderr=float((w * (right - accuracy)).square().sum().sqrt() / (groups * classes)),
        class_accuracy=float((w * read[:, :, None]).sum(1).mean()),
        diversity=float(diversity.mean()),
    )


def score_samples(x_0: Tensor, y: Tensor, c: Tensor, pairs: int, ruler: Ruler, reader: Classifier) -> Score:
    """The score of samples.

    Args:
        x_0: (P · n, *), n samples for each pair in turn.
        y, c: (P · n,), the classes asked for.
        pairs: P.
        ruler, reader: as in `score_target`.
    """
    measured = ruler(x_0)
    features = reader.features(x_0).view(pairs, -1, reader.score.in_features)
    even = torch.full((*features.shape[:2], 1), 1 / features.shape[1])
    right = (measured == y).float()
    return Score(
        accuracy=float(right.mean()),
        accuracy_stderr=float(right.std() / len(right) ** 0.5),
        class_accuracy=float((reader.log_prob(x_0).argmax(1) == c).float().mean()),
        diversity=float(weighted_diversity(features, even).mean()),
        macro_f1=float(f1_score(y.numpy(), measured.numpy(), average="macro", zero_division=0.0)),
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
