"""Compute p̂(y | x) or p̂(y | x, c) on clean x by a network; save and load it.

One temperature T, fitted on a split of its own, divides the logits (Guo et al. 2017).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import Images
from ..system.files import read_tensors, write_json, write_tensors
from .heads import HEADS

PIXELS_AT_ONCE = 2**22  # of images in one pass: a convolution at full size keeps ten times its image


class EmbeddedFilm(nn.Module):
    """Compute the scale and shift of features from embeddings of c (B, F), so that c without any label have some too.

    A dimension in which the embeddings of the labels' c hardly differ would see every difference of another c, so it is
    measured in a hundredth of the largest deviation at least.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(length, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(length))
        self.register_buffer("std", torch.ones(length))

    def standardise(self, vectors: Tensor) -> None:
        """Set mean and deviation from embeddings (n, F) of the labels' c."""
        std = vectors.std(0, correction=0)
        self.mean.copy_(vectors.mean(0))
        self.std.copy_(std.clamp(min=0.01 * float(std.max())) if std.max() > 0 else torch.ones_like(std))

    def forward(self, c: Tensor) -> Tensor:
        scale: Tensor = self.linear((c - self.mean) / self.std / math.sqrt(len(self.mean)))
        return scale


class Scorer(nn.Module):
    """Compute log p̂(y | x), or log p̂(y | x, c), from a trunk's features by a head and a temperature.

    A `balanced` fit weighs every class alike. The network then knows the posterior under even classes; the labels' log
    frequencies are added after the temperature, so that p̂ is the posterior under these, balanced or not.

    Args:
        trunk: x (B, *) → features (B, width), or the logits (B, K) themselves if width is 0.
        classes, head: K, of classes or of a scale's levels; a name in HEADS.
        conditions: number of classes of c, 0 for p̂(y | x). c scales and shifts the features (FiLM, Perez et al. 2018):
            an embedding that is only added moves the logits alike for every x and could not reverse y's meaning.
        embedding: length F of the vectors that stand for c in place of a number; 0 for none.
    """

    at_once = 1024  # x; thousands of images at once would not fit, nor a few dozen large ones
    latent = False  # whether x are the latents of a latent model
    borrowed: str | tuple[str, ...] = ()  # prefixes of the names of weights that `save` leaves out
    shape: dict[str, Any]  # the arguments that make it again
    described: str
    temperature: Tensor  # ()
    log_frequency: Tensor  # (K,), of a balanced fit
    film: nn.Embedding | EmbeddedFilm  # of p̂(y | x, c)

    def __init__(
        self, trunk: nn.Module, width: int, classes: int, head: str = "categorical", balanced: bool = False,
        conditions: int = 0, embedding: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head, self.balanced, self.embedding = HEADS[head](classes), balanced, embedding
        self.conditional = conditions > 0 or embedding > 0
        self.classes, self.trunk = classes, trunk
        self.score = nn.Linear(width, self.head.outputs or classes) if width else nn.Identity()
        if conditions:
            self.film = nn.Embedding.from_pretrained(torch.zeros(conditions, 2 * width), freeze=False)
        elif embedding:
            self.film = EmbeddedFilm(embedding, 2 * width)
        for name, value in self.head.weights().items():
            self.register_parameter(name, nn.Parameter(value))
        if balanced:
            self.register_buffer("log_frequency", torch.zeros(classes))
        self.register_buffer("temperature", torch.ones(()))

    def features(self, x: Tensor | Images) -> Tensor:
        """Return features (B, F) of x (B, C, H, W) in [−1, 1], whose rows are read a few at a time."""
        return self.in_parts(self.trunk, x)

    def evidence(self, x: Tensor | Images) -> Tensor:
        """Return what `Support` measures distances in: (B, E), the features unless an earlier layer keeps more of x."""
        return self.features(x)

    def in_parts(self, trunk: Callable[[Tensor], Tensor], x: Tensor | Images) -> Tensor:
        """Apply a trunk to x (B, C, H, W), no more pixels at once than fit."""
        few = max(1, min(self.at_once, PIXELS_AT_ONCE // math.prod(x.shape[2:])))
        parts = x.split(few) if isinstance(x, Tensor) else (x[rows] for rows in torch.arange(len(x)).split(few))
        return torch.cat([trunk(part.to(self.temperature.device)) for part in parts])

    def scores(self, x: Tensor | Images, c: Tensor | None = None) -> Tensor:
        """Return raw scores (B, head.outputs) of x, given c (B,), or its embedding (B, F), for p̂(y | x, c).

        Raises ValueError for a wrong c.
        """
        features = self.features(x)
        if (c is not None) != self.conditional:
            raise ValueError("this is p̂(y | x, c): give c." if self.conditional else "this is p̂(y | x): leave c out.")
        if c is not None:
            self.check_condition(c)
            scale, shift = self.film(c.to(features.device)).chunk(2, dim=1)
            features = features * (1 + scale) + shift
        score: Tensor = self.score(features)
        return score

    def check_condition(self, c: Tensor) -> None:
        """Refuse (ValueError) c that are no numbers of the labels' classes, or no embeddings of their length."""
        if self.embedding:
            if c.ndim != 2 or c.shape[1] != self.embedding:
                got = " × ".join(map(str, c.shape))
                raise ValueError(f"p̂(y | x, c) is given c by embeddings of length {self.embedding}, got {got} numbers.")
        elif isinstance(self.film, nn.Embedding) and not 0 <= c.min() <= c.max() < self.film.num_embeddings:
            raise ValueError(f"c must lie in 0 … {self.film.num_embeddings - 1}, got {c.unique().tolist()}.")

    def log_prob(self, x: Tensor | Images, c: Tensor | None = None) -> Tensor:
        """Return log p̂(y | x) or log p̂(y | x, c) in nats (B, K); raises as `scores` does."""
        return self.log_prob_from(self.scores(x, c), self.temperature)

    def log_prob_at(self, x: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
        """Return log p̂ in nats at labels y (B,), which on a scale may lie between levels: (B,)."""
        return -self.nll(self.scores(x, c), self.temperature, y)

    @property
    def bound(self) -> float:
        """The largest log p̂ there can be, in nats."""
        return self.head.bound

    @property
    def head_weights(self) -> dict[str, Tensor]:
        """What the head has fitted beside the scores, by name."""
        return {name: getattr(self, name) for name in self.head.weights()}

    def log_prob_from(self, score: Tensor, temperature: Tensor | float) -> Tensor:
        """Return log p̂ (B, K) from raw scores at a temperature."""
        log_prob = self.head.log_prob(score, temperature, **self.head_weights)
        return F.log_softmax(log_prob + self.log_frequency, dim=1) if self.balanced else log_prob

    def nll(self, score: Tensor, temperature: Tensor | float, y: Tensor, reduction: str = "none") -> Tensor:
        """Return −log p̂ in nats at labels y (B,): (B,), or () by the reduction "sum" or "mean"."""
        y = y.to(score.device)
        if self.balanced:
            return F.nll_loss(self.log_prob_from(score, temperature), y, reduction=reduction)
        return self.head.nll(score, temperature, y, reduction, **self.head_weights)

    def save(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """Write `classifier.safetensors`, and `classifier.json` with its shape and what else `about` says of it."""
        weights = {name: value for name, value in self.state_dict().items() if not name.startswith(self.borrowed)}
        write_tensors(folder / "classifier.safetensors", weights)
        write_json(folder / "classifier.json", {"kind": type(self).__name__, "shape": self.shape, **(about or {})})

    @classmethod
    def load(cls, folder: Path) -> "Scorer":
        """Read a saved classifier of this kind."""
        classifier = cls(**json.loads((folder / "classifier.json").read_text(encoding="utf-8"))["shape"])
        missing, unknown = classifier.load_state_dict(read_tensors(folder / "classifier.safetensors"), strict=False)
        if misfits := [name for name in missing if not name.startswith(cls.borrowed)] + unknown:
            raise ValueError(f"weights that do not fit: {', '.join(misfits)}")
        return classifier.requires_grad_(False).eval()


def of_embedding(length: int) -> dict[str, int]:
    """Return the argument that makes a network given embeddings of c, of another none: its files stay as they were."""
    return {"embedding": length} if length else {}


class Classifier(Scorer):
    """Compute p̂(y | x) by a small convolutional network with average pooling, fitted on a few hundred images.

    Args:
        classes, head, balanced, conditions, embedding: see `Scorer`.
        grid: cells a side of the average pooling: 1 for textures and amounts, 4 for shapes.
        depth: convolutions of 3 × 3; more than one are normalised by groups.
        halvings: how many of them, from the second on, have stride 2.
        width: of the convolutions; the features have twice as many.
    """

    def __init__(
        self, channels: int, classes: int, head: str = "categorical", grid: int = 1, depth: int = 1, halvings: int = 0,
        width: int = 32, balanced: bool = False, conditions: int = 0, embedding: int = 0,
    ) -> None:  # fmt: skip
        layers: list[nn.Module] = []
        for i in range(depth):
            stride = 2 if 1 <= i <= halvings else 1
            layers.append(nn.Conv2d(width if i else channels, width, 3, padding=1, stride=stride))
            layers += [nn.GroupNorm(8, width), nn.SiLU()] if depth > 1 else [nn.SiLU()]
        layers += [nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(grid * grid * width, 2 * width), nn.SiLU()]
        super().__init__(nn.Sequential(*layers), 2 * width, classes, head, balanced, conditions, embedding)
        self.shape = {
            "channels": channels, "classes": classes, "head": head, "grid": grid, "depth": depth, "halvings": halvings,
            "width": width, "balanced": balanced, "conditions": conditions, **of_embedding(embedding),
        }  # fmt: skip
        layer = "1 convolution" if depth == 1 else f"{depth} convolutions"
        self.described = f"{layer}, average pooling to {grid} × {grid}, head: {head}"

    def evidence(self, x: Tensor | Images) -> Tensor:
        # the layer after the pooling learns to drop what does not decide y, and with it what tells an image from noise
        assert isinstance(self.trunk, nn.Sequential)
        return self.in_parts(self.trunk[:-2], x)


@dataclass(frozen=True)
class Architecture:
    """Describe a `Classifier` to fit; call it with the shape (C, H, W) of x and K to build the network."""

    head: str = "categorical"
    grid: int = 1
    depth: int | None = None  # convolutions; None for as few as bring the short side to about 8 pixels
    balanced: bool = False
    conditions: int = 0
    embedding: int = 0

    def __call__(self, shape: Sequence[int], classes: int) -> Classifier:
        shrink = max(0, round(math.log2(min(shape[1:]) / 8)))
        depth = 1 + shrink if self.depth is None else self.depth
        options = {**asdict(self), "depth": depth, "halvings": min(max(shrink, 1), depth - 1)}
        return Classifier(shape[0], classes, **options)


class Estimator:
    """Use a fitted scikit-learn classifier as p̂(y | x). It has no gradient: train with `weighted` and `ppo`.

    Args:
        estimator: with `predict_proba`, fitted on rows of pixels (n, C · H · W) and `classes` 0 … K − 1, or ValueError.
        smallest: no probability is taken to be less; a reward must be finite.
    """

    def __init__(self, estimator: Any, classes: int, smallest: float = 1e-4) -> None:
        if not hasattr(estimator, "predict_proba"):
            raise ValueError(f"{type(estimator).__name__} has no predict_proba: p̂(y | x) needs probabilities.")
        fitted = list(getattr(estimator, "classes_", []))
        if fitted != list(range(classes)):
            needed = f"0 … {classes - 1}, every one and no other"
            raise ValueError(f"the classifier was fitted on the classes {fitted}; needed: {needed}.")
        self.estimator, self.smallest = estimator, smallest

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p̂(y | x) in nats (B, K) for x (B, *)."""
        pixels = x.detach().flatten(1).cpu().numpy()
        p = torch.from_numpy(self.estimator.predict_proba(pixels)).clamp(min=self.smallest)
        return (p / p.sum(1, keepdim=True)).log().to(x)
