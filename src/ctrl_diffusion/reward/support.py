"""Measure how far samples are from the labelled images p̂ was fitted on: p̂ may be high where nobody labelled anything.

The distance is Mahalanobis' on the classifier's evidence (Lee et al. 2018), with a shrunk covariance (Ledoit & Wolf
2004), since the features often outnumber the images. The border is conformal (Vovk et al. 2005): of n images the fit
has not seen, the ⌈0.95 (n + 1)⌉-th by distance. A new image like them lies beyond it with a probability of at most 5 %,
of rank k with 1 − k/(n + 1) exactly. Of fewer than 19 there is no such rank: the farthest has 1/(n + 1), the least that
can be had of n, and is taken with a warning.
"""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..system.files import read_tensors, write_tensors

BEYOND = 0.05  # the share of unseen labelled images that lie outside


@dataclass
class Support:
    """Describe the region of features (F,) that labelled images fill."""

    mean: Tensor  # (F,)
    whitening: Tensor  # (F, F), after which distances are Euclidean
    border: Tensor  # the distance within which all but `beyond` of unseen labelled images lie; infinite at first
    # the share of new images like the labelled ones that lie outside, as the border promises: of many 0.05, 0 at first
    beyond: Tensor = field(default_factory=lambda: torch.tensor(BEYOND))

    @classmethod
    def fit(cls, features: Tensor) -> "Support":
        """Estimate it from features (n, F) of the fitting part."""
        from sklearn.covariance import LedoitWolf

        mean, std = features.mean(0), features.std(0)
        if not std.max() > 0:  # all images are alike: whatever differs from them lies outside
            return cls(mean, torch.eye(len(mean)).to(mean), torch.tensor(math.inf))
        std = std.clamp(min=1e-3 * float(std.max()))  # a feature that never moved would see every difference
        covariance = torch.from_numpy(LedoitWolf().fit(((features - mean) / std).numpy()).covariance_).to(mean)
        variance, axes = torch.linalg.eigh(covariance)
        variance = variance.clamp(min=torch.finfo(variance.dtype).eps * float(variance.max()))  # rounding may go below
        return cls(mean, axes / variance.sqrt() / std[:, None], torch.tensor(math.inf), torch.tensor(0.0))

    def calibrate(self, features: Tensor, share: float = BEYOND) -> "Support":
        """Set the border so that `share` of features (n, F) the fit has not seen lie beyond; return the support.

        Warns if n are too few for that share: the border is then the farthest of them.
        """
        n, needed = len(features), math.ceil(1 / share) - 1
        rank = math.ceil((1 - share) * (n + 1)) if n >= needed else n
        self.beyond = torch.tensor(1 - rank / (n + 1))
        if n < needed:
            warnings.warn(
                f"the region p̂ knows rests on {n} held-out images: {1 / (n + 1):.1%} of images like them lie outside, "
                f"not {share:.0%}, for which it takes {needed}. Bring more labels.",
                stacklevel=2,
            )
        self.border = self.distance(features).sort().values[rank - 1]
        return self

    def distance(self, features: Tensor) -> Tensor:
        """Return distances (n,) from the mean of the fitting part, in standard deviations."""
        distance: Tensor = ((features - self.mean) @ self.whitening).norm(dim=1)
        return distance

    def outside(self, features: Tensor) -> Tensor:
        """Return whether each of features (n, F) lies beyond the border: (n,)."""
        return self.distance(features) > self.border

    def share(self, features: Tensor) -> float:
        """Return the share of features (n, F) beyond the border: `beyond` of what is like the labelled images."""
        return float(self.outside(features).float().mean())

    def save(self, path: Path) -> None:
        write_tensors(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Support":
        return cls(**read_tensors(path))
