"""Fit, calibrate and report a classifier."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.images import Images
from .scorer import Architecture, EmbeddedFilm, Scorer

OTHERS = 8  # images in place of each, to find what p̂(y | x, c) says without its own

Network = Callable[[Sequence[int], int], Scorer]  # from the shape of x, (C, H, W) or (F,), and K


@dataclass
class ClassifierReport:
    """Hold p̂'s quality on held-out data, NLLs in nats; on a scale y is measured in levels."""

    accuracy: float  # share of labels that p̂ finds likeliest; on a scale, whose nearest level p̂'s mean is nearest to
    nll: float
    ece: float  # in 10 bins; on a scale of how often the central intervals of 10 … 90 % hold y (Kuleshov et al. 2018)
    temperature: float
    # of the best guess without x, for p̂(y | x, c) given c: y's frequencies, or where c is an embedding the mean of p̂
    # over other images, if that is better; on a scale a normal distribution
    chance_nll: float
    nll_stderr: float
    nll_uncalibrated: float  # at T = 1
    brier: float | None  # mean of Σ_k (p̂_k − 1[y = k])², 0 … 2 (Brier 1950); None on a scale
    auroc: (
        float | None
    )  # of one class against the rest, mean over classes; None on a scale, or where a class is missing
    r2: float | None = None  # share of the variance of y on a scale that p̂'s mean explains; None for classes


def any_side_up(x: Tensor) -> Tensor:
    """Mirror and turn x (n, C, H, H) by quarters at random, for labels that do not care: eight views of each."""
    swaps: list[Callable[[Tensor], Tensor]] = [
        lambda a: a.flip(-1),
        lambda a: a.flip(-2),
        lambda a: a.transpose(-1, -2),
    ]
    for swap in swaps:
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, swap(x), x)
    return x


def half_turn(x: Tensor) -> Tensor:
    """Turn x (n, C, H, W) by half a turn at random: what slants goes on slanting the same way."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1, -2), x)


def shift(x: Tensor) -> Tensor:
    """Shift x (n, C, H, W) at random by up to an eighth of the short side; the border is repeated."""
    n, channels, height, width = x.shape
    most = max(1, min(height, width) // 8)
    padded = F.pad(x, (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, n, 1))
    rows, columns = (down + torch.arange(height))[:, None, :, None], (right + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]


# what may be done to x without changing y
AUGMENTATIONS = {"none": None, "shift": shift, "any_side_up": any_side_up, "half_turn": half_turn}


@dataclass(frozen=True)
class Recipe:
    """Describe a fit by AdamW under a one-cycle schedule."""

    epochs: int = 200
    batch: int = 32
    lr: float = 1e-2
    weight_decay: float = 1e-3
    augment: Callable[[Tensor], Tensor] | None = None  # changes a batch of x in ways that keep y


def fit_classifier(
    x: Tensor | Images, y: Tensor, classes: int, network: Network | None = None, recipe: Recipe | None = None,
    c: Tensor | None = None, watch: tuple[Tensor, ...] | None = None, seed: int = 0,
    progress: Callable[[], None] | None = None, device: torch.device | str = "cpu",
) -> Scorer:  # fmt: skip
    """Fit p̂(y | x), or p̂(y | x, c), on clean x; return it uncalibrated, in eval mode, frozen, on the CPU.

    Args:
        x: (n, C, H, W), or features (n, F) for a network that takes these.
        y, classes: labels (n,), of K classes or levels.
        network: builds what is fitted; None for `Architecture()`, a categorical `Classifier`.
        c: class numbers (n,) of the condition, 0 … network.conditions − 1, or its embeddings (n, network.embedding).
        watch: (x, y), or (x, y, c), not fitted on, whose least calibrated NLL picks the epoch; None picks the last.
        seed: of weights and order; global random state is left alone.
    """
    recipe, best, least = recipe or Recipe(), None, math.inf
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        classifier = (network or Architecture())(x.shape[1:], classes).to(device)
        weights = None
        if classifier.balanced:
            counts = y.bincount(minlength=classifier.classes).clamp(min=1)
            classifier.log_frequency.copy_((counts / counts.sum()).log())
            weights = len(y) / (classifier.classes * counts)
        if classifier.embedding and c is not None and isinstance(classifier.film, EmbeddedFilm):
            classifier.film.standardise(c)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        batches = -(-len(x) // recipe.batch)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=recipe.lr, total_steps=recipe.epochs * batches)
        for _ in range(recipe.epochs):
            classifier.train()
            for batch in torch.randperm(len(x)).chunk(batches):
                inputs = x[batch] if recipe.augment is None else recipe.augment(x[batch])
                score = classifier.scores(inputs, None if c is None else c[batch])
                loss = classifier.head.nll(score, 1.0, y[batch].to(score.device), "none", **classifier.head_weights)
                # not the weighted mean: dividing by a batch's own weights would move the balance
                loss = loss.mean() if weights is None else (weights[y[batch]].to(loss) * loss).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cycle.step()
            if watch and (nll := calibrated_nll(classifier.eval(), *watch)) < least:
                least, best = nll, {name: value.clone() for name, value in classifier.state_dict().items()}
            if progress:
                progress()
    if best:
        classifier.load_state_dict(best)
        classifier.temperature.fill_(1.0)
    return classifier.requires_grad_(False).eval().cpu()


@torch.no_grad()
def calibrate(
    classifier: Scorer, x: Tensor | Images, y: Tensor, c: Tensor | None = None, spread: float = 0.5
) -> Scorer:
    """Set the temperature from (x, y) or (x, y, c), n examples the fit has not seen.

    Minimises n · NLL + ½ (log T/spread)². A few dozen examples that happen to be all right would alone send T to 0, and
    a reward that steep is a promise nobody checked; the prior on log T keeps it near the fit's own scale.
    """
    from scipy.optimize import minimize_scalar

    score = classifier.scores(x, c)

    def objective(log_temperature: float) -> float:
        nll = float(classifier.nll(score, math.exp(log_temperature), y, "sum"))
        return nll + 0.5 * (log_temperature / spread) ** 2

    classifier.temperature.fill_(math.exp(minimize_scalar(objective, bounds=(-3.0, 3.0), method="bounded").x))
    return classifier


@torch.no_grad()
def calibrated_nll(classifier: Scorer, x: Tensor | Images, y: Tensor, c: Tensor | None = None) -> float:
    """Calibrate on n examples and return the NLL there, in nats: scale alone must not decide between two fits."""
    calibrate(classifier, x, y, c)
    return float(classifier.nll(classifier.scores(x, c), classifier.temperature, y, "sum")) / len(y)


@torch.no_grad()
def report_classifier(classifier: Scorer, x: Tensor | Images, y: Tensor, c: Tensor | None = None) -> ClassifierReport:
    """Measure on (x, y) or (x, y, c), a split neither fit nor calibration has seen."""
    score, temperature = classifier.scores(x, c), classifier.temperature
    density = classifier.head.density(score.cpu(), temperature.cpu())
    counted = None if classifier.embedding else c  # y cannot be counted given an embedding that occurs once
    figures: dict[str, Any] = classifier.head.figures(
        classifier.log_prob_from(score, temperature).cpu(), density, y, counted
    )
    if classifier.embedding:
        assert c is not None  # `scores` refuses none
        others = nll_of_other_images(classifier, x, y, c)
        figures["chance_nll"] = min(figures["chance_nll"] or math.inf, others)
    nll, uncalibrated = (float(classifier.nll(score, t, y, "mean")) for t in (temperature, 1.0))
    stderr = float(classifier.nll(score, temperature, y).std() / len(y) ** 0.5)
    return ClassifierReport(
        nll=nll, temperature=float(temperature), nll_stderr=stderr, nll_uncalibrated=uncalibrated, **figures
    )


def nll_of_other_images(classifier: Scorer, x: Tensor | Images, y: Tensor, c: Tensor) -> float:
    """Return the NLL in nats of y (n,) under what p̂ says of c alone, its mean over OTHERS of the other x (n, *)."""
    row, log_p = torch.arange(n := len(y)), []
    for shift in sorted({max(1, i * n // (OTHERS + 1)) for i in range(1, OTHERS + 1)}):
        score = classifier.scores(x[(row + shift) % n], c)
        log_p.append(-classifier.nll(score, classifier.temperature, y))
    return float(math.log(len(log_p)) - torch.stack(log_p).logsumexp(0).mean())
