"""Fit p̂(y | x_t, t): a classifier with α_t and σ_t as two more channels, on x noised to the times of a chain."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..chain.noise import normal
from ..chain.rollout import Times
from ..chain.schedule import Schedule, per_sample
from ..reward.fit import Recipe, calibrate, fit_classifier
from ..reward.scorer import Architecture, Scorer

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
        """Return log p̂ in nats (B,) at y (B,) on a scale."""
        return self.classifier.log_prob_at(with_clock(x_t, t, self.schedule), y, **cond)


def with_clock(x_t: Tensor, t: Tensor | float, schedule: Schedule) -> Tensor:
    """Return x_t (B, C, *) with two more channels, α_t and σ_t."""
    clock = torch.stack(schedule(t), dim=-1).to(x_t).expand(len(x_t), 2)
    return torch.cat([x_t, clock.view(-1, 2, *[1] * (x_t.ndim - 2)).expand(-1, 2, *x_t.shape[2:])], dim=1)


def fit_noisy(
    x: Tensor, y: Tensor, classes: int, schedule: Schedule, times: Times, held_out: tuple[Tensor, ...] | None = None,
    architecture: Architecture | None = None, recipe: Recipe | None = None, c: Tensor | None = None, seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> NoisyClassifier:  # fmt: skip
    """Fit p̂(y | x_t, t) at the times of a chain, as `fit_classifier` fits p̂(y | x), with noise added.

    Args:
        x: (n, C, H, W), or (n, D), clean; latents if the prior is a latent model.
        y, classes: (n,), of K classes.
        schedule, times: the prior's, and its chain's grid.
        held_out: (x, y), or (x, y, c), to choose the epoch and the temperature by; None keeps the last and T = 1.
        architecture, recipe, c, progress: see `fit_classifier`; of vectors the head alone counts, not grid and depth.
        seed: of weights, order and noise.
    """
    generator, t_grid = torch.Generator().manual_seed(seed), torch.tensor(times[:-1], dtype=torch.float64)
    architecture, recipe = architecture or Architecture(), recipe or Recipe()

    def noised(clean: Tensor) -> Tensor:
        x_0 = clean[:, :-2] if recipe.augment is None else recipe.augment(clean[:, :-2])
        t = t_grid[torch.randint(len(t_grid), (len(x_0),), generator=generator)]
        alpha, sigma = (per_sample(a, x_0) for a in schedule(t))
        return with_clock(alpha * x_0 + sigma * normal(x_0.shape, x_0, generator), t, schedule)

    def of_vectors(shape: Sequence[int], classes: int) -> Scorer:
        layers = (nn.Linear(shape[0], WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        options = (architecture.head, architecture.balanced, architecture.conditions)
        return Scorer(nn.Sequential(*layers), WIDTH, classes, *options)

    watch: tuple[Tensor, ...] | None = None
    if held_out:
        x_held, *labels = (row.repeat_interleave(VIEWS, dim=0) for row in held_out)
        with torch.random.fork_rng(devices=[]):  # an augmentation draws from the global generator
            torch.default_generator.manual_seed(seed)
            watch = (noised(with_clock(x_held, 0.0, schedule)), *labels)
    network, noisy_recipe = of_vectors if x.ndim == 2 else architecture, replace(recipe, augment=noised)
    clean = with_clock(x, 0.0, schedule)
    classifier = fit_classifier(clean, y, classes, network, noisy_recipe, c, watch, seed, progress)
    if watch:  # VIEWS of one example count as one example against the prior on the temperature
        calibrate(classifier, watch[0], watch[1], watch[2] if len(watch) > 2 else None, 0.5 / VIEWS**0.5)
    return NoisyClassifier(classifier, schedule)
