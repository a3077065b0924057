"""Measure how near samples are to real x with the same labels, and how different from each other they are.

None of these is 0, or 1, of real x either: the Fréchet distance of a few x is too large by what their moments are off,
and their coverage is low. So real x are held out and measured as samples are: the row to compare others with.

All distances are taken within y: a sampler that ignores y draws from the right x over all, and from the wrong ones for
each y. The space is that of the features diversity is measured in, the reader's or pixels, each divided by its standard
deviation over real x.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..control.conditions import Conditions
from ..data.labels import NULL
from .judge import Observation
from .scores import weighted_diversity

NEIGHBOURS = 5


def frechet_distance(real: Tensor, samples: Tensor) -> float:
    """Compute the Fréchet distance (Heusel et al. 2017) between two sets of features (n, F) and (m, F)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = nn.Identity()  # the features were computed already
    network.num_features = width = real.shape[1]
    metric = FrechetInceptionDistance(feature=network, input_img_size=(width,), normalize=True)
    metric.update(real, real=True)
    metric.update(samples, real=False)
    return float(metric.compute())


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """Compute the Euclidean distance in pixels of each x (n, *) to its nearest reference (m, *): (n,)."""
    return torch.cdist(x.flatten(1), reference.flatten(1)).min(1).values


def kernel_distance(real: list[Tensor], samples: list[Tensor]) -> float:
    """Compute the kernel distance (Bińkowski et al. 2018) between two mixtures: the unbiased MMD² of a cubic kernel.

    Both are features (n_c, F), n_c ≥ 2, of each part c of the mixture, all of one weight. Drawn part by part they are
    no independent draws of the mixture, so that x of one part are compared within it.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[1] + 1) ** 3

    def means(x: list[Tensor], y: list[Tensor]) -> Tensor:  # of each part with each other
        return torch.stack([torch.stack([kernel(a.double(), b.double()).mean() for b in y]) for a in x])

    def within(x: list[Tensor]) -> Tensor:  # of two different x of a mixture
        mean = means(x, x)
        for i, part in enumerate(x):
            k = kernel(part.double(), part.double())
            mean[i, i] = (k.sum() - k.diagonal().sum()) / (len(part) * (len(part) - 1))
        return mean.mean()

    return float(within(real) + within(samples) - 2 * means(real, samples).mean())


class Manifolds(NamedTuple):
    """Hold shares: samples in the real manifold, real x in the samples', real balls with a sample in them."""

    precision: float
    recall: float
    coverage: float


def manifolds(real: Tensor, samples: Tensor, k: int = NEIGHBOURS) -> Manifolds:
    """Compute precision, recall (Kynkäänniemi et al. 2019) and coverage (Naeem et al. 2020) of features (n, F), (m, F).

    A set's manifold is the union of the balls about its points that reach to their k-th nearest neighbour.
    """
    distances = torch.cdist(real, samples)

    def radius(x: Tensor) -> Tensor:  # to the k-th nearest neighbour; the nearest of all is x itself
        return torch.cdist(x, x).kthvalue(min(k + 1, len(x)), dim=1).values

    inside = distances <= radius(real)[:, None]
    precision, coverage = inside.any(0), inside.any(1)
    recall = (distances <= radius(samples)[None]).any(1)
    return Manifolds(*(float(share.float().mean()) for share in (precision, recall, coverage)))


def even(parts: list[Tensor]) -> Tensor:
    """Join parts (n_c, F) of a mixture, each repeated to the length of the longest: torchmetrics has no weights."""
    most = max(len(x) for x in parts)
    return torch.cat([x[torch.arange(most) % len(x)] for x in parts])


@dataclass
class Fidelity:
    """Hold means over labels y; see `Yardstick`."""

    frechet: float
    kernel: float
    precision: float
    recall: float
    coverage: float
    diversity_ratio: float


@dataclass
class Yardstick:
    """Compare samples with real x of each (c, y), and their diversity with that of prior samples that have y."""

    conditions: Conditions
    real: list[Tensor]  # features (n, F) of real x of each pair; few or none of a rare one, which is left out
    held_out: list[Tensor]  # features (m, F) of other real x of each pair, to measure what is real
    scale: Tensor  # (F,), divides the features
    diversity: Tensor  # (P,), mean distance of two prior samples that have y; NaN where fewer than two have it

    @classmethod
    def from_observations(
        cls, conditions: Conditions, real: Observation, group: Tensor, prior: Observation, held_out: int = 0,
        seed: int = 0,
    ) -> "Yardstick":  # fmt: skip
        """Make it from real x of conditions (n,) and M prior samples for each condition, observed as samples are.

        Of each pair `held_out` real x, at most half of them, are drawn by the seed and compared with the others.
        """
        label = conditions.label_of(real.labels)
        pair = torch.where(label == NULL, NULL, group * conditions.classes + label)
        members = len(prior.features) // conditions.groups
        label = conditions.label_of(prior.labels).view(conditions.groups, members, 1)
        w = (label == torch.arange(conditions.classes)).double()
        w = w / w.sum(1, keepdim=True)  # NaN where no sample has y
        enough = (w > 0).sum(1) > 1
        scale = real.features.std(0).clamp(min=1e-6)
        features = (prior.features / scale).view(conditions.groups, members, -1).double()
        diversity = torch.where(enough, weighted_diversity(features, w.nan_to_num()), torch.nan)
        by_pair = [real.features[pair == p] / scale for p in range(conditions.pairs)]
        halves, generator = [], torch.Generator().manual_seed(seed)
        for x in by_pair:
            count = min(held_out, len(x) // 2) if len(x) > 3 else 0  # two and two at least
            out = torch.zeros(len(x), dtype=torch.bool)
            out[torch.randperm(len(x), generator=generator)[:count]] = True
            halves.append((x[~out], x[out]))
        kept, others = map(list, zip(*halves, strict=True))
        return cls(conditions, kept, others, scale, diversity.flatten())

    def fidelity(self, features: Tensor) -> Fidelity:
        """Compute the fidelity of samples from their features (P · n, F), n for each pair in turn."""
        return self.compare(list((features / self.scale).view(self.conditions.pairs, -1, features.shape[1])))

    def fidelity_of_real(self) -> Fidelity | None:
        """Compute the fidelity of the real x that were held out; None if there are too few of every pair."""
        return self.compare(self.held_out) if any(len(x) > 1 for x in self.held_out) else None

    def compare(self, by_pair: list[Tensor]) -> Fidelity:
        """Compute the fidelity of samples from their scaled features (n, F) of each pair.

        Distances are taken within each y that real x have, since a pair has few; every c with that y weighs the same.
        """
        by_label = []
        for label in range(self.conditions.classes):
            of_label = range(label, self.conditions.pairs, self.conditions.classes)
            pairs = [p for p in of_label if min(len(self.real[p]), len(by_pair[p])) > 1]
            if not pairs:
                continue
            real, samples = [self.real[p] for p in pairs], [by_pair[p] for p in pairs]
            distances = frechet_distance(even(real), even(samples)), kernel_distance(real, samples)
            by_label.append((*distances, *manifolds(torch.cat(real), torch.cat(samples))))
        diversity = torch.full((len(by_pair),), torch.nan)
        for p, x in enumerate(by_pair):
            if len(x) > 1:
                diversity[p] = weighted_diversity(x[None], torch.full((1, len(x), 1), 1 / len(x)))
        ratio = diversity / self.diversity
        return Fidelity(*torch.tensor(by_label, dtype=torch.float64).mean(0).tolist(), float(ratio.nanmean()))
