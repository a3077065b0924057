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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torch.distributions import Normal
from torchmetrics.functional.classification import multiclass_auroc, multiclass_calibration_error

from .system.files import read_tensors, write_json, write_tensors

Head = Literal["categorical", "ordinal", "gaussian"]
# in levels: a value asked for is meant no more exactly. Labels without noise would else make p̂ a needle
RESOLUTION = 0.25
PIXELS_AT_ONCE = 2**22  # of images looked at together: a convolution at full size keeps ten times its image


@dataclass
class ClassifierReport:
    """Quality on held-out data; nll in nats, ece over 10 bins of confidence, chance_nll that of the best
    guess without looking at x, the entropy of the labels (given c, for p̂(y | x, c)).

    brier is the mean of Σ_k (p̂_k − 1[y = k])², 0 … 2 (Brier 1950); auroc the mean over classes of the area under the
    curve of one against the rest, None if a class is missing from the data.

    Of y on a scale: r2 is the share of its variance that the mean of p̂ explains, accuracy the share whose nearest level
    p̂'s mean is nearest to, ece the mean distance of how often the central intervals of 10 … 90 % hold y from what they
    say (Kuleshov et al. 2018), nll in units of levels and chance_nll that of one normal distribution for all.
    """

    accuracy: float
    nll: float
    ece: float
    temperature: float
    chance_nll: float
    nll_stderr: float
    nll_uncalibrated: float
    brier: float | None
    auroc: float | None
    r2: float | None = None


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


def any_side_up(x: Tensor) -> Tensor:
    """Random mirror images and quarter turns of x (n, C, H, H), for labels that do not care: eight views of each."""
    for swap in (lambda a: a.flip(-1), lambda a: a.flip(-2), lambda a: a.transpose(-1, -2)):
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, swap(x), x)
    return x


def half_turn(x: Tensor) -> Tensor:
    """Random half turns of x (n, C, H, W): what slants goes on slanting the same way."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1, -2), x)


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
    "none": None, "shift": shift, "any_side_up": any_side_up, "half_turn": half_turn
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
    balanced: bool = False,
    watch: tuple[Tensor, ...] | None = None,
    c: Tensor | None = None,
    conditions: int = 0,
    network: Callable[[], Scorer] | None = None,
    device: torch.device | str = "cpu",
) -> Scorer:
    """Fit on clean x (n, C, H, W), y (n,) and, for p̂(y | x, c), c (n,); uncalibrated, in eval mode, frozen.

    Args:
        x, y: the fitting split.
        classes: K.
        head, grid, balanced, conditions: see `Classifier`.
        depth: of the convolutions; None for as few as bring the short side to about 8 pixels.
        epochs, batch, lr, weight_decay: AdamW under a one-cycle schedule.
        seed: of weights and order; global random state is left alone.
        augment: changes a batch of x in ways that keep y.
        progress: called after each epoch.
        watch: (x, y), or (x, y, c), that the fit does not see; the weights of the epoch whose NLL there, calibrated, is
            the least are kept. None keeps the last.
        c: class numbers of the prior's condition, 0 … conditions − 1.
        network: makes what is fitted, whatever its x is; None makes a `Classifier` of classes, head, grid, depth,
            balanced and conditions.
        device: on which it is fitted; it comes back to the CPU.
    """
    if network is None:
        shrink = max(0, round(math.log2(min(x.shape[2:]) / 8)))
        depth = 1 + shrink if depth is None else depth
        shape = {"depth": depth, "halvings": min(max(shrink, 1), depth - 1)}
        network = partial(
            Classifier, x.shape[1], classes, head, grid, **shape, balanced=balanced, conditions=conditions
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = network()
        weights = None
        if classifier.balanced:
            counts = y.bincount(minlength=classes).clamp(min=1)
            weights = len(y) / (classes * counts)
            classifier.log_frequency.copy_((counts / counts.sum()).log())
        classifier.to(device)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=weight_decay)
        batches, least = -(-len(x) // batch), math.inf
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * batches)
        for _ in range(epochs):
            classifier.train()
            for rows in torch.randperm(len(x)).chunk(batches):
                inputs = x[rows] if augment is None else augment(x[rows])
                score = classifier.scores(inputs, None if c is None else c[rows])
                loss = classifier.misses(score, 1.0, y[rows])
                # not the weighted mean: dividing by a batch's own weights would move the balance
                loss = loss.mean() if weights is None else (weights[y[rows]].to(loss) * loss).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
            if watch and (nll := calibrated_nll(classifier.eval(), *watch)) < least:
                least, best = nll, {name: value.clone() for name, value in classifier.state_dict().items()}
            if progress:
                progress()
    if watch:
        classifier.load_state_dict(best)
        classifier.temperature.fill_(1.0)
    return classifier.requires_grad_(False).eval().cpu()


@torch.no_grad()
def calibrate(classifier: Scorer, x: Tensor, y: Tensor, c: Tensor | None = None, spread: float = 0.5) -> Scorer:
    """Set the temperature from (x, y) or (x, y, c), n examples the fit has not seen.

    Minimises n · NLL + ½ (log T/spread)². A few dozen examples that happen to be all right would alone send T to 0, and
    a reward that steep is a promise nobody checked; the prior on log T keeps it near the fit's own scale.
    """
    score = classifier.scores(x, c)

    def objective(log_temperature: float) -> float:
        return total_nll(classifier, score, math.exp(log_temperature), y) + 0.5 * (log_temperature / spread) ** 2

    best = minimize_scalar(objective, bounds=(-3.0, 3.0), method="bounded")
    classifier.temperature.fill_(math.exp(best.x))
    return classifier


@torch.no_grad()
def calibrated_nll(classifier: Scorer, x: Tensor, y: Tensor, c: Tensor | None = None) -> float:
    """NLL in nats on (x, y) at the temperature that suits these: scale alone must not decide between two fits."""
    calibrate(classifier, x, y, c)
    return total_nll(classifier, classifier.scores(x, c), classifier.temperature, y) / len(y)


def total_nll(classifier: Scorer, score: Tensor, temperature: Tensor | float, y: Tensor) -> float:
    """Σ −log p̂ at y (B,) in nats."""
    if classifier.head == "gaussian":
        return float(classifier.misses(score, temperature, y).sum())
    return float(F.nll_loss(classifier.log_prob_from(score, temperature), y.to(score.device), reduction="sum"))


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


def guess_nll(y: Tensor, classes: int) -> float:
    """NLL in nats of the best guess of y (n,) without looking: the entropy, less the bias of few (Miller 1955)."""
    counts = y.bincount(minlength=classes)
    entropy = torch.distributions.Categorical(probs=counts / len(y)).entropy()
    return float(entropy) + (int((counts > 0).sum()) - 1) / (2 * len(y))


@torch.no_grad()
def report_classifier(classifier: Scorer, x: Tensor, y: Tensor, c: Tensor | None = None) -> ClassifierReport:
    """Measure on (x, y) or (x, y, c), a split neither fit nor calibration has seen."""
    score = classifier.scores(x, c)
    if classifier.head == "gaussian":
        return report_density(classifier, score.cpu(), y)
    log_prob, raw = (classifier.log_prob_from(score, t).cpu() for t in (classifier.temperature, 1.0))
    p, classes = log_prob.exp(), log_prob.shape[1]
    counts = y.bincount(minlength=classes)
    return ClassifierReport(
        accuracy=float((log_prob.argmax(1) == y).float().mean()),
        nll=float(F.nll_loss(log_prob, y)),
        ece=float(multiclass_calibration_error(p, y, num_classes=classes, n_bins=10)),
        temperature=float(classifier.temperature),
        chance_nll=float(torch.distributions.Categorical(probs=counts / len(y)).entropy())
        if c is None
        else sum(guess_nll(y[c == group], classes) * float((c == group).float().mean()) for group in c.unique()),
        nll_stderr=float(F.nll_loss(log_prob, y, reduction="none").std() / len(y) ** 0.5),
        nll_uncalibrated=float(F.nll_loss(raw, y)),
        brier=float((p - F.one_hot(y, classes)).square().sum(1).mean()),
        auroc=float(multiclass_auroc(p, y, num_classes=classes)) if 0 < counts.min() < len(y) else None,
    )


def coverage(density: Normal, y: Tensor) -> tuple[Tensor, Tensor]:
    """The central intervals of 10 … 90 % and how often they hold y (n,): two (9,)."""
    said = torch.arange(1, 10) / 10
    return said, ((2 * density.cdf(y) - 1).abs()[:, None] <= said).float().mean(0)


def report_density(classifier: Scorer, score: Tensor, y: Tensor) -> ClassifierReport:
    """As `report_classifier`, for y on a scale."""
    temperature, last = classifier.temperature.cpu(), classifier.classes - 1
    density, misses = classifier.density(score, temperature), classifier.misses(score, temperature, y)
    said, came = coverage(density, y)
    return ClassifierReport(
        accuracy=float((density.mean.round().clamp(0, last) == y.round().clamp(0, last)).float().mean()),
        nll=float(misses.mean()),
        ece=float((said - came).abs().mean()),
        temperature=float(classifier.temperature),
        chance_nll=float(Normal(y.mean(), y.std()).entropy()),
        nll_stderr=float(misses.std() / len(y) ** 0.5),
        nll_uncalibrated=float(classifier.misses(score, 1.0, y).mean()),
        brier=None,
        auroc=None,
        r2=r2_score(y.numpy(), density.mean.numpy()),
    )
