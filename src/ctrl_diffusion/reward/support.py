"""Measure how far samples are from the labelled images p̂ was fitted on: p̂ may be high where nobody labelled anything.

The distance is Mahalanobis' on the classifier's evidence (Lee et al. 2018), with a shrunk covariance (Ledoit & Wolf
2004), since the features often outnumber the images. The border is conformal (Vovk et al. 2005): of n images the fit
has not seen, the ⌈0.95 (n + 1)⌉-th by distance. A new image like them lies beyond it with a probability of at most 5 %.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor

from ..system.files import read_tensors, write_tensors

BEYOND = 0.05  # the share of unseen labelled images that lie outside


@dataclass
class Support:
    """Describe the region of features (F,) that labelled images fill."""

    mean: Tensor  # (F,)
    whitening: Tensor  # (F, F), after which distances are Euclidean
    border: Tensor  # the distance within which 95 % of unseen labelled images lie; infinite before `calibrate`

    @classmethod
    def fit(cls, features: Tensor) -> "Support":
        """Estimate it from features (n, F) of the fitting part."""
        mean, std = features.mean(0), features.std(0)
        if not std.max() > 0:  # all images are alike: whatever differs from them lies outside
            return cls(mean, torch.eye(len(mean)).to(mean), torch.tensor(math.inf))
        std = std.clamp(min=1e-3 * float(std.max()))  # a feature that never moved would see every difference
        covariance = torch.from_numpy(LedoitWolf().fit(((features - mean) / std).numpy()).covariance_).to(mean)
        variance, axes = torch.linalg.eigh(covariance)
        variance = variance.clamp(min=torch.finfo(variance.dtype).eps * float(variance.max()))  # rounding may go below
        return cls(mean, axes / variance.sqrt() / std[:, None], torch.tensor(math.inf))

    def calibrate(self, features: Tensor, share: float = BEYOND) -> "Support":
        """Set the border so that `share` of features (n, F) the fit has not seen lie beyond; return the support."""
        rank = math.ceil((1 - share) * (len(features) + 1))
        self.border = self.distance(features).sort().values[min(rank, len(features)) - 1]
        return self

    def distance(self, features: Tensor) -> Tensor:
        """Return distances (n,) from the mean of the fitting part, in standard deviations."""
        return ((features - self.mean) @ self.whitening).norm(dim=1)

    def outside(self, features: Tensor) -> Tensor:
        """Return whether each of features (n, F) lies beyond the border: (n,)."""
        return self.distance(features) > self.border

    def share(self, features: Tensor) -> float:
        """Return the share of features (n, F) beyond the border: 0.05 of what is like the labelled images."""
        return float(self.outside(features).float().mean())

    def save(self, path: Path) -> None:
        write_tensors(path, vars(self))

    @classmethod
    def load(cls, path: Path) -> "Support":
        return cls(**read_tensors(path))
