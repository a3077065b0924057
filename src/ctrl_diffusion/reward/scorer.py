"""p̂(y | x) on clean x: fit, calibrate, report.

A small convolutional network with average pooling, fitted on a few hundred images of any size. Ordered classes get an
ordinal head (cumulative logits, McCullagh 1980): P(y > k) = σ(s(x) − b_k), one score and K − 1 increasing cuts. One
temperature T, fitted on a split of its own, divides the logits (Guo et al. 2017), the cumulative ones for the ordinal
head.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from ..system.files import read_tensors, write_json, write_tensors

Head = Literal["categorical", "ordinal", "gaussian"]
# in levels: a value asked for is meant no more exactly. Labels without noise would else make p̂ a needle
RESOLUTION = 0.25
PIXELS_AT_ONCE = 2**22  # of images looked at together: a convolution at full size keeps ten times its image


class Scorer(nn.Module):
    """log p̂(y | x), or log p̂(y | x, c), from the features of a trunk: the head, the temperature, the frequencies.

    A Gaussian head is for y on a scale, a place between levels 0 … K − 1: it gives a mean and a log standard deviation
    for each x (Nix & Weigend 1994), and for log p̂ the density at the levels. Its temperature scales the deviation.

    Args:
        trunk: x (B, *) → features (B, F).
        width: F; 0 if the trunk gives the logits (B, K) themselves.
        classes: K.
        head: "categorical", "ordinal" (classes in order) or "gaussian".
        balanced: whether the fit weighs every class as if it were as frequent as the others. What the network then
            knows is the posterior under even classes; the log frequencies of the labels are added to it, after the
            temperature, so that p̂ is the posterior under the labels' own frequencies, balanced or not.
        conditions: number of classes of c, 0 for p̂(y | x). c scales and shifts the features (FiLM, Perez et al. 2018):
            an embedding that is only added moves the logits alike for every x and could not turn y's meaning round.
    """

    at_once = 1024  # x; thousands of images at once would not fit, nor a few dozen large ones
    latent = False  # whether x are the latents of a latent model
    borrowed: str | tuple[str, ...] = ()  # how the names of weights begin that are not ours to save
    shape: dict[str, Any]
    described: str

    def __init__(
        self,
        trunk: nn.Module,
        width: int,
        classes: int,
        head: Head = "categorical",
        balanced: bool = False,
        conditions: int = 0,
    ) -> None:
        super().__init__()
        self.head, self.balanced, self.conditional = head, balanced, conditions > 0
        self.classes = classes
        self.trunk = trunk
        self.score = (
            nn.Linear(width, {"categorical": classes, "ordinal": 1, "gaussian": 2}[head]) if width else nn.Identity()
        )
        if conditions:
            self.film = nn.Embedding.from_pretrained(torch.zeros(conditions, 2 * width), freeze=False)
        if head == "ordinal":
            self.first_cut = nn.Parameter(torch.tensor(-1.0))
            self.log_gaps = nn.Parameter(torch.zeros(classes - 2))
        if balanced:
            self.register_buffer("log_frequency", torch.zeros(classes))
        self.register_buffer("temperature", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """Features (B, F) of x (B, C, H, W) in [−1, 1], which need not be in memory before its rows are asked for."""
        return self.in_parts(self.trunk, x)

    def evidence(self, x: Tensor) -> Tensor:
        """What `Support` looks at: (B, E); the features, unless there is something before them that keeps more of x."""
        return self.features(x)

    def in_parts(self, trunk: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        few = max(1, min(self.at_once, PIXELS_AT_ONCE // math.prod(x.shape[2:])))
        parts = x.split(few) if isinstance(x, Tensor) else (x[rows] for rows in torch.arange(len(x)).split(few))
        return torch.cat([trunk(part.to(self.temperature.device)) for part in parts])

    def scores(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Raw scores of x: (B, K), or (B, 1) of an ordinal head, (B, 2) of a Gaussian one.

        Raises:
            ValueError: c is missing, not wanted or unknown.
        """
        features = self.features(x)
        if (c is not None) != self.conditional:
            raise ValueError("this is p̂(y | x, c): give c." if self.conditional else "this is p̂(y | x): leave c out.")
        if self.conditional:
            if not 0 <= c.min() <= c.max() < self.film.num_embeddings:
                raise ValueError(f"c must lie in 0 … {self.film.num_embeddings - 1}, got {c.unique().tolist()}.")
            scale, shift = self.film(c.to(features.device)).chunk(2, dim=1)
            features = features * (1 + scale) + shift
        return self.score(features)

    def log_prob(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """log p̂(y | x) or log p̂(y | x, c) in nats (B, K), c (B,) class numbers; raises as `scores` does."""
        return self.log_prob_from(self.scores(x, c), self.temperature)

    def log_prob_at(self, x: Tensor, y: Tensor, c: Tensor | None = None) -> Tensor:
        """log p̂ in nats at places y (B,) between the levels, of a Gaussian head: (B,)."""
        return self.density(self.scores(x, c), self.temperature).log_prob(y)

    def density(self, score: Tensor, temperature: Tensor | float) -> Normal:
        """The normal distribution (B,) a Gaussian head's scores (B, 2) mean."""
        # beyond e^±5 levels no deviation is believable, and its square would overflow
        std = temperature * score[:, 1].clamp(-5, 5).exp()
        return Normal(score[:, 0], (std.square() + RESOLUTION**2).sqrt(), validate_args=False)

    def misses(self, score: Tensor, temperature: Tensor | float, y: Tensor) -> Tensor:
        """−log p̂ of what is fitted at y (B,), classes or places: (B,) nats."""
        y = y.to(score.device)
        if self.head == "gaussian":
            return -self.density(score, temperature).log_prob(y)
        return F.nll_loss(self.fitted_log_prob(score, temperature), y, reduction="none")

    def log_prob_from(self, score: Tensor, temperature: Tensor | float) -> Tensor:
        """log p̂ (B, K) from raw scores (B, K) or (B, 1) at a temperature."""
        fitted = self.fitted_log_prob(score, temperature)
        return F.log_softmax(fitted + self.log_frequency, dim=1) if self.balanced else fitted

    def fitted_log_prob(self, score: Tensor, temperature: Tensor | float) -> Tensor:
        """What is fitted (B, K): log p̂, or if balanced, what it would be were the classes equally frequent."""
        if self.head == "categorical":
            return F.log_softmax(score / temperature, dim=1)
        if self.head == "gaussian":
            levels = torch.arange(self.classes).to(score)[:, None]
            return self.density(score, temperature).log_prob(levels).T
        cuts = torch.cat([self.first_cut[None], self.first_cut + self.log_gaps.exp().cumsum(0)])
        above = (score - cuts) / temperature  # logits of y > k
        # log(σ(a) − σ(b)) for a > b, as log σ(a) + log σ(−b) + log(1 − e^(b − a)): exact far in the tails
        tops, bottoms = F.logsigmoid(above), F.logsigmoid(-above)
        gaps = torch.log(-torch.expm1(above[:, 1:] - above[:, :-1]))
        between = tops[:, :-1] + bottoms[:, 1:] + gaps
        return torch.cat([bottoms[:, :1], between, tops[:, -1:]], dim=1)

    def save(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """Write `classifier.safetensors` and `classifier.json` (its shape, and what else is to be known about it)."""
        mine = {name: value for name, value in self.state_dict().items() if not name.startswith(self.borrowed)}
        write_tensors(folder / "classifier.safetensors", mine)
        write_json(folder / "classifier.json", {"kind": type(self).__name__, "shape": self.shape, **(about or {})})

    @classmethod
    def load(cls, folder: Path) -> "Scorer":
        """Read a saved classifier of this kind."""
        classifier = cls(**json.loads((folder / "classifier.json").read_text(encoding="utf-8"))["shape"])
        missing, unknown = classifier.load_state_dict(read_tensors(folder / "classifier.safetensors"), strict=False)
        if missing := [name for name in missing if not name.startswith(cls.borrowed)] + unknown:
            raise ValueError(f"weights that do not fit: {', '.join(missing)}")
        return classifier.requires_grad_(False).eval()


class Classifier(Scorer):
    """p̂(y | x) by a small convolutional network.

    Args:
        channels: of x.
        classes, head, balanced, conditions: see `Scorer`.
        grid: cells a side of the average pooling: 1 for textures and amounts, 4 for shapes.
        depth: convolutions of 3 × 3; more than one are normalised by groups.
        halvings: how many of them, from the second on, have stride 2.
        width: of the convolutions; the features have twice as many.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        head: Head = "categorical",
        grid: int = 1,
        depth: int = 1,
        halvings: int = 0,
        width: int = 32,
        balanced: bool = False,
        conditions: int = 0,
    ) -> None:
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(
                nn.Conv2d(width if i else channels, width, 3, padding=1, stride=2 if 1 <= i <= halvings else 1)
            )
            layers += [nn.GroupNorm(8, width), nn.SiLU()] if depth > 1 else [nn.SiLU()]
        pooled = [nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(grid * grid * width, 2 * width), nn.SiLU()]
        super().__init__(nn.Sequential(*layers, *pooled), 2 * width, classes, head, balanced, conditions)
        self.shape = {
            "channels": channels, "classes": classes, "head": head, "grid": grid, "depth": depth, "halvings": halvings,
            "width": width, "balanced": balanced, "conditions": conditions,
        }  # fmt: skip
        what = "1 convolution" if depth == 1 else f"{depth} convolutions"
        self.described = f"{what}, average pooling to {grid} × {grid}, head: {head}"

    def evidence(self, x: Tensor) -> Tensor:
        """The pooled convolutions (B, grid² · width): the layer after them learns to drop what does not decide y, and
        with it the difference between an image and noise."""
        return self.in_parts(self.trunk[:-2], x)


class Estimator:
    """A fitted scikit-learn classifier as p̂(y | x). It has no gradient: train with `weighted` and `ppo`.

    Args:
        estimator: with `predict_proba`, fitted on rows of pixels (n, C · H · W) and classes 0 … K − 1.
        classes: K.
        smallest: no probability is taken to be less; a reward must be finite.

    Raises:
        ValueError: no `predict_proba`, not fitted, or fitted on other classes than 0 … K − 1.
    """

    def __init__(self, estimator: Any, classes: int, smallest: float = 1e-4) -> None:
        if not hasattr(estimator, "predict_proba"):
            raise ValueError(f"{type(estimator).__name__} has no predict_proba: p̂(y | x) needs probabilities.")
        known = list(getattr(estimator, "classes_", []))
        if known != list(range(classes)):
            raise ValueError(
                f"the classifier was fitted on the classes {known}; needed: 0 … {classes - 1}, every one and no other."
            )
        self.estimator, self.smallest = estimator, smallest

    def log_prob(self, x: Tensor) -> Tensor:
        """log p̂(y | x) in nats (B, K) for x (B, *)."""
        p = torch.from_numpy(self.estimator.predict_proba(x.detach().flatten(1).cpu().numpy()))
        p = p.clamp(min=self.smallest)
        return (p / p.sum(1, keepdim=True)).log().to(x)
