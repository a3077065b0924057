"""How near samples are to real x that have the labels asked for, and how different from each other they are.

All distances are taken within what was asked for: a sampler that ignores y draws from the right x over all, and from
the wrong ones for each y. The space is that of the features a judge measures diversity in, the reader's or pixels, each
divided by its standard deviation over real x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ..control.conditions import Conditions
from .judge import Look
from .scores import weighted_diversity

NEIGHBOURS = 5


class Given(nn.Module):
    """Features that were computed already, in the form torchmetrics asks for.

    Args:
        width: F.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(real: Tensor, samples: Tensor) -> float:
    """Fréchet distance (Heusel et al. 2017) between two sets of features (n, F) and (m, F)."""
    width = real.shape[1]
    metric = FrechetInceptionDistance(feature=Given(width), input_img_size=(width,), normalize=True)
    metric.update(real, real=True)
    metric.update(samples, real=False)
    return float(metric.compute())


def nearest_distance(x: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance in pixels of each x (n, *) to its nearest neighbour in the reference (m, *): (n,)."""
    return torch.cdist(x.flatten(1), reference.flatten(1)).min(1).values


def kernel_distance(real: list[Tensor], samples: list[Tensor]) -> float:
    """Kernel distance (Bińkowski et al. 2018) between two mixtures: the unbiased MMD² of a cubic kernel.

    Args:
        real, samples: features (n_c, F) of each part c of the mixtures, which all weigh the same, two at least. Drawn
            part by part they are no independent draws of the mixture, so that x of one part are compared within it.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[1] + 1) ** 3

    def means(x: list[Tensor], y: list[Tensor]) -> Tensor:
        """The mean kernel of each part with each other."""
        return torch.stack([torch.stack([kernel(a.double(), b.double()).mean() for b in y]) for a in x])

    def fellows(x: list[Tensor]) -> Tensor:
        """The mean kernel of two different ones of a mixture."""
        mean = means(x, x)
        for i, part in enumerate(x):
            k = kernel(part.double(), part.double())
            mean[i, i] = (k.sum() - k.diagonal().sum()) / (len(part) * (len(part) - 1))
        return mean.mean()

    return float(fellows(real) + fellows(samples) - 2 * means(real, samples).mean())


def manifolds(real: Tensor, samples: Tensor, k: int = NEIGHBOURS) -> tuple[float, float, float]:
    """Precision and recall (Kynkäänniemi et al. 2019) and coverage (Naeem et al. 2020) of features (n, F) and (m, F).

    A set's manifold is the union of the balls about its points that reach to their k-th nearest fellow.

    Returns:
        The share of samples in the real manifold, of real x in the samples' manifold, and of real balls with a sample.
    """
    distances = torch.cdist(real, samples)

    def reach(x: Tensor) -> Tensor:
        """Distance of each x to its k-th nearest fellow; the nearest of all is itself."""
        return torch.cdist(x, x).kthvalue(min(k + 1, len(x)), dim=1).values

    inside = distances <= reach(real)[:, None]
    precision, coverage = inside.any(0), inside.any(1)
    recall = (distances <= reach(samples)[None]).any(1)
    return tuple(float(share.float().mean()) for share in (precision, recall, coverage))


@dataclass
class Fidelity:
    """Means over what was asked for; see `Yardstick`."""

    frechet: float
    kernel: float
    precision: float
    recall: float
    coverage: float
    diversity_ratio: float


@dataclass
class Yardstick:
    """Real x with each (c, y), and how different samples of the prior are that happen to have it.

    Args:
        conditions: the pairs (c, y).
        real: features (n, F) of real x of each pair; few or none of a rare one, which is left out.
        scale: (F,), what features are divided by.
        diversity: (P,), mean distance of two samples of the prior that have y; NaN where fewer than two were seen.
    """

    conditions: Conditions
    real: list[Tensor]
    scale: Tensor
    diversity: Tensor

    @classmethod
    def of(cls, conditions: Conditions, real: Look, group: Tensor, of_prior: Look) -> "Yardstick":
        """From a look at real x, with the condition (n,) of each, and one at M samples of the prior for each condition.

        y of both is what the judge measures, as for the samples that are compared.
        """
        pair = group * conditions.classes + conditions.label_of(real.measured)
        members = len(of_prior.features) // conditions.groups
        has = conditions.label_of(of_prior.measured).view(conditions.groups, members, 1)
        w = (has == torch.arange(conditions.classes)).double()
        w = w / w.sum(1, keepdim=True)  # NaN where nothing has y
        seen = (w > 0).sum(1) > 1
        scale = real.features.std(0).clamp(min=1e-6)
        features = (of_prior.features / scale).view(conditions.groups, members, -1).double()
        spread = torch.where(seen, weighted_diversity(features, w.nan_to_num()), torch.nan)
        return cls(
            conditions, [real.features[pair == p] / scale for p in range(conditions.pairs)], scale, spread.flatten()
        )

    def fidelity(self, features: Tensor) -> Fidelity:
        """Of features (P · n, F) of samples, n for each pair in turn.

        Distances are taken within each y that real x have, since a pair has few; every c that occurs with y weighs the
        same.
        """
        of_pair = (features / self.scale).view(self.conditions.pairs, -1, features.shape[1])
        within = []
        for label in range(self.conditions.classes):
            known = [p for p in range(label, self.conditions.pairs, self.conditions.classes) if len(self.real[p]) > 1]
            if not known:
                continue
            real, samples = [self.real[p] for p in known], [of_pair[p] for p in known]
            most = max(len(x) for x in real)
            even = torch.cat([x[torch.arange(most) % len(x)] for x in real])  # torchmetrics knows no weights
            whole = torch.cat(samples)
            distances = frechet_distance(even, whole), kernel_distance(real, samples)
            within.append((*distances, *manifolds(torch.cat(real), whole)))
        even = torch.full((*of_pair.shape[:2], 1), 1 / of_pair.shape[1])
        ratio = weighted_diversity(of_pair, even).squeeze(1) / self.diversity
        return Fidelity(*torch.tensor(within, dtype=torch.float64).mean(0).tolist(), float(ratio.nanmean()))
