"""Fit p̂(y | x_t, t): a classifier with α_t and σ_t as two more channels, on x noised to the times of a chain."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.noise import normal
from ..chain.rollout import Times
from ..chain.schedule import Schedule, per_sample
from ..reward.fit import calibrate, fit_classifier
from ..reward.scorer import Scorer

VIEWS = 8  # noisy copies of each held-out example
WIDTH = 64  # of the network for x that are not images


class NoisyClassifier:
    """Evaluate p̂(y | x_t, t) by a classifier of x_t with the channels of `with_clock`."""

    def __init__(self, classifier: Scorer, schedule: Schedule) -> None:
        self.classifier, self.schedule, self.conditional = classifier, schedule, classifier.conditional

    def log_prob(self, x_t: Tensor, t: Tensor | float, **cond: Tensor) -> Tensor:
        """Return log p̂(y | x_t, t) in nats (B, K)."""
        return self.classifier.log_prob(with_clock(x_t, t, self.schedule), **cond)

    def log_prob_at(self, x_t: Tensor, y: Tensor, t: Tensor | float, **cond: Tensor) -> Tensor:
        """Return log p̂ in nats (B,) at positions y (B,) on a scale."""
        return self.classifier.log_prob_at(with_clock(x_t, t, self.schedule), y, **cond)


def with_clock(x_t: Tensor, t: Tensor | float, schedule: Schedule) -> Tensor:
    """Return x_t (B, C, *) with two more channels, α_t and σ_t."""
    clock = torch.stack(schedule(t), dim=-1).to(x_t).expand(len(x_t), 2)
    return torch.cat([x_t, clock.view(-1, 2, *[1] * (x_t.ndim - 2)).expand(-1, 2, *x_t.shape[2:])], dim=1)


def fit_noisy(
    x: Tensor,
    y: Tensor,
    classes: int,
    schedule: Schedule,
    times: Times,
    held_out: tuple[Tensor, ...] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> NoisyClassifier:
    """Fit p̂(y | x_t, t) at the times of a chain, as p̂(y | x) is fitted, with noise added.

    Args:
        x: (n, C, H, W), or (n, D), clean; latents if the prior is a latent model.
        y: (n,).
        classes: K.
        schedule, times: the prior's, and its chain's grid.
        held_out: (x, y), or (x, y, c), to choose the epoch and the temperature by; None keeps the last and T = 1.
        augment: changes a batch of x in ways that keep y, before the noise.
        seed: of weights, order and noise.
        options: of `fit_classifier`.
    """
    generator, t_grid = torch.Generator().manual_seed(seed), torch.tensor(times[:-1], dtype=torch.float64)

    def noised(clean: Tensor) -> Tensor:
        x_0 = clean[:, :-2] if augment is None else augment(clean[:, :-2])
        t = t_grid[torch.randint(len(t_grid), (len(x_0),), generator=generator)]
        alpha, sigma = (per_sample(a, x_0) for a in schedule(t))
        return with_clock(alpha * x_0 + sigma * normal(x_0.shape, x_0, generator), t, schedule)

    def network() -> Scorer:
        layers = (nn.Linear(x.shape[1] + 2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        kind = {name: options[name] for name in ("head", "balanced", "conditions") if name in options}
        return Scorer(nn.Sequential(*layers), WIDTH, classes, **kind)

    watch = None
    if held_out:
        x_held, *rest = (row.repeat_interleave(VIEWS, dim=0) for row in held_out)
        watch = (noised(with_clock(x_held, 0.0, schedule)), *rest)
    if x.ndim == 2:
        options.setdefault("network", network)
    clean = with_clock(x, 0.0, schedule)
    classifier = fit_classifier(clean, y, classes, augment=noised, seed=seed, watch=watch, **options)
    if watch:  # VIEWS of one example count as one example against the prior on the temperature
        calibrate(classifier, *watch, spread=0.5 / VIEWS**0.5)
    return NoisyClassifier(classifier, schedule)
