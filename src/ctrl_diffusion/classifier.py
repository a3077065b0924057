"""p̂(y | x) on clean x: fit, calibrate, report.

A small convolutional network with average pooling, fitted on a few hundred images of any size. Ordered classes get an
ordinal head (cumulative logits, McCullagh 1980): P(y > k) = σ(s(x) − b_k), one score and K − 1 increasing cuts. One
temperature T, fitted on a split of its own, divides the logits (Guo et al. 2017), the cumulative ones for the ordinal
head.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_auroc, multiclass_calibration_error

from .files import write_json, writing

Head = Literal["categorical", "ordinal"]


@dataclass
class ClassifierReport:
    """Quality on held-out data; nll in nats, ece over 10 bins of confidence, chance_nll that of the best
    guess without looking, the entropy of the labels.

    brier is the mean of Σ_k (p̂_k − 1[y = k])², 0 … 2 (Brier 1950); auroc the mean over classes of the area under the
    curve of one against the rest, None if a class is missing from the data.
    """

    accuracy: float
    nll: float
    ece: float
    temperature: float
    chance_nll: float
    nll_stderr: float
    nll_uncalibrated: float
    brier: float
    auroc: float | None


class Classifier(nn.Module):
    """p̂(y | x).

    Args:
        channels: of x.
        classes: K.
        head: "categorical" or "ordinal" (classes in order).
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
    ) -> None:
        super().__init__()
        self.shape = {
            "channels": channels, "classes": classes, "head": head,
            "grid": grid, "depth": depth, "halvings": halvings, "width": width,
        }  # fmt: skip
        self.head = head
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(
                nn.Conv2d(width if i else channels, width, 3, padding=1, stride=2 if 1 <= i <= halvings else 1)
            )
            layers += [nn.GroupNorm(8, width), nn.SiLU()] if depth > 1 else [nn.SiLU()]
        self.trunk = nn.Sequential(
            *layers,
            nn.AdaptiveAvgPool2d(grid),
            nn.Flatten(),
            nn.Linear(grid * grid * width, 2 * width),
            nn.SiLU(),
        )
        self.score = nn.Linear(2 * width, classes if head == "categorical" else 1)
        if head == "ordinal":
            self.first_cut = nn.Parameter(torch.tensor(-1.0))
            self.log_gaps = nn.Parameter(torch.zeros(classes - 2))
        self.register_buffer("temperature", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """Features (B, 2 width) of x (B, C, H, W) in [−1, 1]."""
        # in parts: thousands of images at once would not fit
        return torch.cat([self.trunk(part) for part in x.split(1024)])

    def log_prob(self, x: Tensor) -> Tensor:
        """log p̂(y | x) in nats: (B, K)."""
        return self.log_prob_from(self.score(self.features(x)), self.temperature)

    def log_prob_from(self, score: Tensor, temperature: Tensor | float) -> Tensor:
        """log p̂ (B, K) from raw scores (B, K) or (B, 1) at a temperature."""
        if self.head == "categorical":
            return F.log_softmax(score / temperature, dim=1)
        cuts = torch.cat([self.first_cut[None], self.first_cut + self.log_gaps.exp().cumsum(0)])
        above = (score - cuts) / temperature  # logits of y > k
        # log(σ(a) − σ(b)) for a > b, as log σ(a) + log σ(−b) + log(1 − e^(b − a)): exact far in the tails
        tops, bottoms = F.logsigmoid(above), F.logsigmoid(-above)
        gaps = torch.log(-torch.expm1(above[:, 1:] - above[:, :-1]))
        between = tops[:, :-1] + bottoms[:, 1:] + gaps
        return torch.cat([bottoms[:, :1], between, tops[:, -1:]], dim=1)

    def save(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        """Write `classifier.safetensors` and `classifier.json` (its shape, and what else is to be known about it)."""
        with writing(folder / "classifier.safetensors") as temporary:
            save_file(self.state_dict(), temporary)
        write_json(folder / "classifier.json", {"shape": self.shape, **(about or {})})

    @classmethod
    def load(cls, folder: Path) -> "Classifier":
        """Read a saved classifier."""
        classifier = cls(**json.loads((folder / "classifier.json").read_text())["shape"])
        classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
        return classifier.requires_grad_(False).eval()


def any_side_up(x: Tensor) -> Tensor:
    """Random mirror images and quarter turns of x (n, C, H, H), for labels that do not care: eight views of each."""
    for swap in (lambda a: a.flip(-1), lambda a: a.flip(-2), lambda a: a.transpose(-1, -2)):
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, swap(x), x)
    return x


def shift(x: Tensor) -> Tensor:
    """Random shifts of x (n, C, H, W) by up to an eighth of the short side; the border is repeated."""
    n, channels, height, width = x.shape
    most = max(1, min(height, width) // 8)
    padded = F.pad(x, (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, n, 1))
    rows = (down + torch.arange(height))[:, None, :, None]
    columns = (right + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]


# what may be done to x without changing y
AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None, "shift": shift, "any_side_up": any_side_up
}  # fmt: skip


def fit_classifier(
    x: Tensor,
    y: Tensor,
    classes: int,
    head: Head = "categorical",
    grid: int = 1,
    depth: int | None = None,
    epochs: int = 200,
    batch: int = 32,
    lr: float = 1e-2,
    weight_decay: float = 1e-3,
    seed: int = 0,
    augment: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[], None] | None = None,
) -> Classifier:
    """Fit on clean x (n, C, H, W), y (n,); uncalibrated, in eval mode, frozen.

    Args:
        x, y: the fitting split.
        classes: K.
        head, grid: see `Classifier`.
        depth: of the convolutions; None for as few as bring the short side to about 8 pixels.
        epochs, batch, lr, weight_decay: AdamW under a one-cycle schedule.
        seed: of weights and order; global random state is left alone.
        augment: changes a batch of x in ways that keep y.
        progress: called after each epoch.
    """
    shrink = max(0, round(math.log2(min(x.shape[2:]) / 8)))
    depth = 1 + shrink if depth is None else depth
    halvings = min(max(shrink, 1), depth - 1)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = Classifier(x.shape[1], classes, head, grid, depth, halvings).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=weight_decay)
        batches = -(-len(x) // batch)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * batches)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).chunk(batches):
                inputs = x[rows] if augment is None else augment(x[rows])
                loss = F.nll_loss(classifier.log_prob(inputs), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
            if progress:
                progress()
    return classifier.requires_grad_(False).eval()


@torch.no_grad()
def calibrate(classifier: Classifier, x: Tensor, y: Tensor, spread: float = 0.5) -> Classifier:
    """Set the temperature from (x, y), n examples the fit has not seen.

    Minimises n · NLL + ½ (log T/spread)². A few dozen examples that happen to be all right would alone send T to 0, and
    a reward that steep is a promise nobody checked; the prior on log T keeps it near the fit's own scale.
    """
    score = classifier.score(classifier.features(x))

    def objective(log_temperature: float) -> float:
        log_prob = classifier.log_prob_from(score, math.exp(log_temperature))
        return float(F.nll_loss(log_prob, y, reduction="sum")) + 0.5 * (log_temperature / spread) ** 2

    best = minimize_scalar(objective, bounds=(-3.0, 3.0), method="bounded")
    classifier.temperature.fill_(math.exp(best.x))
    return classifier


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


@torch.no_grad()
def report_classifier(classifier: Classifier, x: Tensor, y: Tensor) -> ClassifierReport:
    """Measure on (x, y), a split neither fit nor calibration has seen."""
    log_prob = classifier.log_prob(x)
    raw = classifier.log_prob_from(classifier.score(classifier.features(x)), 1.0)
    p, classes = log_prob.exp(), log_prob.shape[1]
    counts = y.bincount(minlength=classes)
    return ClassifierReport(
        accuracy=float((log_prob.argmax(1) == y).float().mean()),
        nll=float(F.nll_loss(log_prob, y)),
        ece=float(multiclass_calibration_error(p, y, num_classes=classes, n_bins=10)),
        temperature=float(classifier.temperature),
        chance_nll=float(torch.distributions.Categorical(probs=counts / len(y)).entropy()),
        nll_stderr=float(F.nll_loss(log_prob, y, reduction="none").std() / len(y) ** 0.5),
        nll_uncalibrated=float(F.nll_loss(raw, y)),
        brier=float((p - F.one_hot(y, classes)).square().sum(1).mean()),
        auroc=float(multiclass_auroc(p, y, num_classes=classes)) if 0 < counts.min() < len(y) else None,
    )
