"""Fit, calibrate and report a classifier."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.metrics import r2_score
from torch import Tensor
from torch.distributions import Normal
from torchmetrics.functional.classification import multiclass_auroc, multiclass_calibration_error

from .scorer import Classifier, Head, Scorer


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
