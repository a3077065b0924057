"""Measure p̂ on held-out images against the number of labels, and extrapolate with an error: how many are needed?

A loss L (NLL, share of errors, 1 − target) of n labels is fitted by a power law, L = a + b n^−c (Cortes et al. 1994;
Hestness et al. 2017): a stays however many labels come. Every size is fitted on several draws of the labels, whose
spread is the error of a point; laws fitted to points moved by their errors give that of an extrapolation. Draws share
images, the more the larger they are, and all are measured on the same held-out images: the error is of the labels that
were drawn, not of the images that were held out.

The target is the accuracy of a perfect learner with p̂. A run measures it on samples of its prior; before there are any
it is estimated here on the held-out images, weighted for each y by p̂(y | x): Σ p̂(y | x_i) 1[y_i = y] / Σ p̂(y | x_i).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..data.labelled import LabelledImages
from ..reward.classifiers import ClassifierSettings, Fitter, shares_of
from ..reward.panel import Panel
from ..system.progress import Phase, ignore, silent

SHARES = (0.1, 0.18, 0.32, 0.56, 1.0)  # of the labels
DRAWS = 4
RAREST = 4  # labels of a class that a draw has for p̂ at least: three to fit, one to calibrate
BEYOND = (2, 4)  # times the labels there are
POWERS = np.geomspace(0.05, 4, 60)  # c
STEP = POWERS[1] / POWERS[0]
MOVED = 400  # laws that are fitted to points moved by their errors
INTERVAL = 0.05, 0.95
LOSSES = {"nll": 1.0, "accuracy": -1.0, "target": -1.0}  # of each figure: itself, or 1 minus it
UNLIKELY = 0.01  # a law that draws lie this far from by chance is none


@dataclass(frozen=True)
class PowerLaw:
    """Describe a loss of n labels as a + b n^−c."""

    a: float
    b: float
    c: float

    def __call__(self, n: float | np.ndarray) -> float | np.ndarray:
        return self.a + self.b * n**-self.c

    @classmethod
    def fit(cls, n: np.ndarray, loss: np.ndarray, error: np.ndarray, least: float = 0.0) -> "PowerLaw":
        """Fit it to losses (m,) of n (m,) labels by least squares over their errors, with a ≥ `least` and b ≥ 0."""
        _, _, (c,) = least_squares(POWERS, n, loss[None], error, least)
        between = np.geomspace(max(c / STEP, POWERS[0]), min(c * STEP, POWERS[-1]), len(POWERS))
        return cls(*(float(value[0]) for value in least_squares(between, n, loss[None], error, least)))


def least_squares(
    powers: np.ndarray, n: np.ndarray, losses: np.ndarray, error: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a, b and the best of the powers c, each (M,), for rows of losses (M, m); see `PowerLaw.fit`."""
    w, z = error**-2.0, (n / n.max()) ** -powers[:, None]  # (m,), (c, m)
    mean_z, mean = (w * z).sum(1) / w.sum(), (w * losses).sum(1) / w.sum()
    apart = z - mean_z[:, None]
    b = np.maximum(0.0, (w * (losses - mean[:, None])) @ apart.T / (w * apart**2).sum(1))  # (M, c)
    a = mean[:, None] - b * mean_z
    low = a < least  # there the best b goes with a at its bound
    b = np.where(low, np.maximum(0.0, (w * (losses - least)) @ z.T / (w * z**2).sum(1)), b)
    a = np.where(low, least, a)
    squares = (w * (a[..., None] + b[..., None] * z - losses[:, None]) ** 2).sum(-1)
    row, best = np.arange(len(losses)), squares.argmin(1)
    return a[row, best], b[row, best] * n.max() ** powers[best], powers[best]


@dataclass
class Series:
    """Hold one figure against the number of labels, measured and extrapolated."""

    name: str  # of LOSSES
    mean: list[float]  # for each number of labels
    error: list[float]  # standard, of the draws
    law: PowerLaw  # of the loss
    beyond: list[tuple[float, float, float]]  # the figure at each number of labels beyond: expected, low, high
    doubt: str | None  # why the extrapolation means nothing


@dataclass
class LearningCurve:
    """Hold how good p̂ is by the number of labels, those of the judge and the held-out part counted."""

    labels: list[int]
    beyond: list[int]
    series: dict[str, Series]
    draws: list[dict[str, float]]  # the figures of each fit
    held_out: int

    @classmethod
    def from_draws(cls, draws: Sequence[dict[str, float]], held_out: int, least_nll: float = 0.0) -> "LearningCurve":
        """Fit the laws to figures of several draws for each number of labels; `least_nll` no p̂ goes below."""
        labels = sorted({int(row["labels"]) for row in draws})
        beyond = [times * labels[-1] for times in BEYOND]
        series = {}
        for name in LOSSES:
            values = [np.array([row[name] for row in draws if row["labels"] == n]) for n in labels]
            series[name] = fit_series(name, np.array(labels), values, np.array(beyond), least_nll)
        return cls(labels, beyond, series, list(draws), held_out)

    def as_dict(self) -> dict[str, Any]:
        """Return the contents of curve.json."""
        return asdict(self)

    def in_words(self) -> str:
        """Format the curve for a terminal: measured, extrapolated with 90 % intervals, and what means nothing."""
        titles = {"nll": "NLL", "accuracy": "accuracy", "target": "target"}
        lines = [f"{'labels':>8}" + "".join(f"{title:>24}" for title in titles.values())]
        for i, n in enumerate(self.labels):
            cells = [f"{s.mean[i]:.3f} ± {s.error[i]:.3f}" for s in self.series.values()]
            lines.append(f"{n:>8}" + "".join(f"{cell:>24}" for cell in cells))
        for i, n in enumerate(self.beyond):
            cells = ["–" if s.doubt else "{:.3f} ({:.3f} … {:.3f})".format(*s.beyond[i]) for s in self.series.values()]
            lines.append(f"{n:>8}" + "".join(f"{cell:>24}" for cell in cells))
        last = f"the last {len(self.beyond)} rows are extrapolated, with 90 % intervals of the draws"
        doubts = [f"{titles[s.name]}: no extrapolation: {s.doubt}" for s in self.series.values() if s.doubt]
        return "\n".join([*lines, last, *doubts])


def fit_series(
    name: str, labels: np.ndarray, values: Sequence[np.ndarray], beyond: np.ndarray, least_nll: float = 0.0
) -> Series:
    """Fit a figure's power law to the values of the draws of each size, and extrapolate it."""
    sign, one = LOSSES[name], 0.0 if LOSSES[name] > 0 else 1.0
    loss = np.array([one + sign * each.mean() for each in values])
    spread = np.array([each.var(ddof=1) for each in values])
    # few draws know their own spread badly: half of what all sizes have
    error = (np.maximum((spread + spread.mean()) / 2, 1e-12) / [len(each) for each in values]) ** 0.5
    least = least_nll if name == "nll" else 0.0
    law = PowerLaw.fit(labels, loss, error, least)
    moved = loss + error * np.random.default_rng(0).standard_normal((MOVED, len(labels)))
    a, b, c = least_squares(POWERS, labels, moved, error, least)
    others = a[:, None] + b[:, None] * beyond ** -c[:, None]  # (MOVED, beyond)
    bounds = one + sign * np.quantile(others, INTERVAL if sign > 0 else INTERVAL[::-1], axis=0)
    expected = np.asarray(one + sign * law(beyond))
    rows = [(float(each), float(low), float(high)) for each, low, high in zip(expected, *bounds, strict=True)]
    doubt = doubt_of(labels, loss, error, law, others[:, 0], sum(map(len, values)) - len(labels))
    return Series(name, (one + sign * loss).tolist(), error.tolist(), law, rows, doubt)


def doubt_of(
    labels: np.ndarray, loss: np.ndarray, error: np.ndarray, law: PowerLaw, next_loss: np.ndarray, freedom: int
) -> str | None:
    """Say why a law means nothing, None if it may: it has nothing to fall from, does not fit, or is too uncertain.

    `next_loss` has the losses that laws fitted to moved points expect of the nearest number of labels beyond; `freedom`
    is that of the draws, by which errors are known.
    """
    from scipy.stats import f

    if len(labels) < 4:
        return f"{len(labels)} sizes are too few for a law of three numbers"
    fall, fall_error = loss[0] - loss[-1], float(np.hypot(error[0], error[-1]))
    if fall < 2 * fall_error:
        return f"from {labels[0]} to {labels[-1]} labels it does not get better by two standard errors of the draws"
    misfit = float((((law(labels) - loss) / error) ** 2).sum()) / (len(labels) - 3)
    if f.sf(misfit, len(labels) - 3, freedom) < UNLIKELY:
        return "the measured points do not lie on a power law"
    low, high = np.quantile(next_loss, INTERVAL)
    if high - low > fall:
        return f"its interval at {BEYOND[0]} times the labels is wider than all that was gained up to here"
    return None


def learning_curve(
    data: LabelledImages, panel: Panel, judge_data: bool = False, seed: int = 0, phase: Phase = silent,
    encode: Callable[[Tensor], Tensor] | None = None, device: torch.device | str = "cpu",
    say: Callable[[str], None] = ignore, draws: int = DRAWS,
    sizes: Sequence[float] = SHARES,
) -> LearningCurve:  # fmt: skip
    """Fit p̂ as `panel` has it on growing shares of its labels, several draws of each; measure it on its held-out part.

    The arguments are those that the panel was fitted with (`fit_panel`). `sizes` are shares of all labels; `say`
    names those that are left out since a class has fewer than RAREST labels for p̂ there.
    """
    control, settings = panel.control, settled(panel)
    condition = panel.condition if settings.conditional else None
    shares = shares_of(False, judge_data)
    rows = data.split_rows(control, shares, seed)
    pool, held_out = np.concatenate(rows[:2]), data[rows[2]]
    part = data[pool]
    if settings.latents:
        part, held_out = part.through(encode), held_out.through(encode)
    strata = part.strata(control)
    least = int(strata.unique(return_counts=True)[1].min())
    used = [share for share in sizes if round(share * least) >= RAREST]
    if len(used) < len(sizes):
        left_out = ", ".join(f"{share:.0%}" for share in sizes if share not in used)
        say(f"--curve: at {left_out} of the labels a class has fewer than {RAREST} for p̂: left out.")
    if len(used) < 2:
        raise ValueError(f"--curve: the rarest class leaves {least} labels for p̂. Bring {4 * RAREST} of each for it.")
    advance, figures = phase("learning curve", len(used) * draws), []
    for share in used:
        for i in range(draws):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            fitting, calibration = (part[each] for each in drawn(strata, share, shares[1] / sum(shares[:2]), generator))
            fitter = Fitter(control, condition, settings, seed + i, device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the region of so few labels is not used
                fitted, _ = fitter.posterior((fitting, calibration, held_out), silent("", 0), lambda x: x)
            figures.append({"labels": round(share * len(data)), **figures_of(fitted, held_out)})
            advance()
    bound = panel.classifier.head.bound
    return LearningCurve.from_draws(figures, len(held_out), -bound)


def settled(panel: Panel) -> ClassifierSettings:
    """Return the settings of a fitted p̂ with what they had left open as it was chosen: all sizes fit one kind."""
    p_hat, values = panel.classifier, dict(panel.settings or {})
    values |= {name: p_hat.shape[name] for name in ("grid", "depth") if name in p_hat.shape}
    if not p_hat.head.scale and not values.get("factory"):
        values["head"] = p_hat.head.name
    return ClassifierSettings(**values)


def drawn(strata: Tensor, share: float, for_calibration: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw a share of the rows of every stratum (n,): those to fit, and those to calibrate on."""
    fitting, calibration = [], []
    for stratum in strata.unique():
        rows = (strata == stratum).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)][: max(2, round(share * len(rows)))]
        count = max(1, round(for_calibration * len(rows)))
        calibration.append(rows[:count])
        fitting.append(rows[count:])
    return torch.cat(fitting), torch.cat(calibration)


def figures_of(panel: Panel, held_out: LabelledImages) -> dict[str, float]:
    """Return accuracy, NLL and the estimated target of p̂ on held-out images."""
    y = panel.space.nearest(held_out.labels[panel.control])
    target = target_of(panel.log_prob(held_out), y)
    return {"nll": panel.quality.nll, "accuracy": panel.quality.accuracy, "target": target}


def target_of(log_prob: Tensor, y: Tensor) -> float:
    """Estimate the accuracy of a perfect learner with p̂ at γ = 1 from log p̂ (n, K) of images with labels y (n,).

    It is the mean over the labels that occur; images are weighted as samples of the prior are in `scores`.
    """
    weights = log_prob.double().softmax(0)  # of every image, for each requested label
    hits = weights.gather(1, y[:, None]).squeeze(1)
    counted = y.unique()
    return float(torch.stack([hits[y == k].sum() for k in counted]).mean())
