"""The floor of the demo's certificate in one dimension, where it can be computed: no learner, only the grid.

Ink is the mean of 64 pixels, so along the direction that carries it the chain is one-dimensional: a normal ink under
noise σ/8, and a reward that is an ordinal classifier of slope s. The best policy whose steps are Gaussians with the
prior's std follows from backward induction on a grid; log Z from the prior's own recursion. What is left between
the two no learner can remove.
"""

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.special import log_expit, logsumexp
from scipy.stats import norm

from ctrl_diffusion.chain.schedule import Schedule
from ctrl_diffusion.chain.transition import step_std
from ctrl_diffusion.data.digits import digits, ink
from ctrl_diffusion.prior.prior import DIGITS, Prior

Array = NDArray[np.float64]
NOISE, WEIGHTS = hermegauss(31)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
PLACES = np.linspace(-6, 6, 1201)  # in standard deviations of x_t
SHIFTS = np.linspace(-8, 8, 121)  # candidate controls u


def log_classes(m: Array, cuts: Array, slope: float) -> Array:
    """Ordinal log p(y | m): (n, 4)."""
    above = (m[:, None] - cuts) / slope
    between = log_expit(above[:, :-1]) + log_expit(-above[:, 1:]) + np.log(-np.expm1(above[:, 1:] - above[:, :-1]))
    return np.concatenate([log_expit(-above[:, :1]), between, log_expit(above[:, -1:])], axis=1)


def floor(schedule: Schedule, times: tuple[float, ...], spread: float, slope: float) -> tuple[float, float]:
    """log Z − J of the best Gaussian policy in nats, and its accuracy; means over the four classes."""
    cuts = norm.ppf([0.25, 0.5, 0.75]) * spread
    alphas, sigmas = (np.array([float(schedule(t)[k]) for t in times]) for k in (0, 1))
    marginal = np.sqrt((alphas * spread) ** 2 + (sigmas / 8) ** 2)
    shrink = alphas * spread**2 / marginal**2  # E[m | x_t] = shrink · x_t
    end = PLACES * marginal[-1]
    rewards = log_classes(shrink[-1] * end, cuts, slope)
    gaps, hits = [], []
    for y in range(4):
        value, log_z, hit = rewards[:, y], rewards[:, y], (rewards.argmax(1) == y).astype(float)
        after = end
        for i in reversed(range(len(times) - 1)):
            x = PLACES * marginal[i]
            std = float(step_std(schedule, times[i], times[i + 1]))
            rest = np.sqrt(max(sigmas[i + 1] ** 2 - std**2, 0.0)) / sigmas[i]
            mean = (alphas[i + 1] - rest * alphas[i]) * shrink[i] * x + rest * x
            tried = mean[:, None] + SHIFTS * std / 8
            worth = sum(w * np.interp(tried + std / 8 * z, after, value) for z, w in zip(NOISE, WEIGHTS, strict=True))
            worth -= SHIFTS**2 / 2
            best = worth.argmax(1)
            reached = tried[np.arange(len(x)), best][:, None] + std / 8 * NOISE
            value, hit = worth.max(1), np.interp(reached, after, hit) @ WEIGHTS
            log_z = logsumexp(np.interp(mean[:, None] + std / 8 * NOISE, after, log_z), b=WEIGHTS, axis=1)
            after = x
        start = NOISE * sigmas[0] / 8
        gaps.append(logsumexp(np.interp(start, after, log_z), b=WEIGHTS) - np.interp(start, after, value) @ WEIGHTS)
        hits.append(np.interp(start, after, hit) @ WEIGHTS)
    return float(np.mean(gaps)), float(np.mean(hits))


def main() -> None:
    prior = Prior.from_pretrained(DIGITS).denoiser
    spread = float((2 * ink(digits()[0])).std())
    table = Table("slope", "steps", "power", "last σ", "floor (nats)", "accuracy")
    for slope in (0.004,):
        for steps, power, last in ((20, 1.0, 0.1), (40, 1.0, 0.1), (20, 2.0, 0.1), (20, 2.0, 0.05), (40, 2.0, 0.05)):
            gap, accuracy = floor(prior.schedule, prior.times(steps, last, power), spread, slope)
            table.add_row(f"{slope}", f"{steps}", f"{power:g}", f"{last}", f"{gap:.3f}", f"{accuracy:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
