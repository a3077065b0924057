"""Define a baseline: another way to sample p(x | c) p̂(y | x)^γ from the Gaussian chain and the reward that CTRL has.

A method is a dataclass of its hyper-parameters, called with a prior, a reward, labels and conditions; it returns
samples and their cost. The strength w multiplies the reward in every method; at w = 0 all are the prior, bit for bit.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.paths import default_batch, paths
from ..chain.rollout import Times
from ..chain.rows import parts, rows_of
from ..data.labels import Labels
from ..reward.reward import Reward

Cond = dict[str, Tensor]
RewardFunction = Callable[..., Tensor]  # (x (B, *), labels, cond, …) → reward in nats (B,)


@dataclass
class Cost:
    """Count the rows that go through networks for one sample, on average."""

    network_evaluations: float  # of the denoiser, the read-out among them; a prior guided by a prompt takes two in each
    classifier_evaluations: float  # of the reward, or of a noise-aware classifier
    gradient_evaluations: float  # gradients carried back through the denoiser
    classifier_gradients: float  # gradients carried back through the reward


@dataclass
class Samples:
    """Hold samples x_0 (B, *) on the CPU, in the order of the labels, and what one of them cost."""

    x_0: Tensor
    cost: Cost


@contextmanager
def counted(denoiser: Denoiser, reward: RewardFunction) -> Iterator[tuple[Counter[str], RewardFunction]]:
    """Count rows that go through the prior or the yielded reward, forwards and backwards, by the names of `Cost`."""
    rows: Counter[str] = Counter()

    def count(kind: str, backward: str, output: Tensor) -> None:
        n = len(output)
        rows[kind] += n
        if output.requires_grad:
            output.register_hook(lambda _: rows.update({backward: n}))

    def counted_reward(*args: Any) -> Tensor:
        r = reward(*args)
        count("classifier_evaluations", "classifier_gradients", r)
        return r

    hook = denoiser.prior.register_forward_hook(
        lambda module, args, x_hat: count("network_evaluations", "gradient_evaluations", x_hat)
    )
    try:
        yield rows, counted_reward
    finally:
        hook.remove()


@dataclass
class Target:
    """Describe n samples to draw, each from the prior's p(x | c) tilted by exp(w r(x, y, c))."""

    denoiser: Denoiser  # the prior, or a policy
    reward: RewardFunction  # r
    labels: Labels  # y, n rows of each control
    cond: Cond  # c, n rows
    strength: float  # w
    bound: Callable[[], float] = lambda: math.inf  # returns what no reward r of these labels exceeds

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))

    def rows(self, rows: slice | Tensor) -> "Target":
        """Select rows, any of them several times."""
        return replace(self, labels=rows_of(self.labels, rows), cond=rows_of(self.cond, rows))

    def log_tilt(self, x: Tensor, *args: Any) -> Tensor:
        """Return w r (n,) of x (n, *)."""
        return self.strength * self.reward(x, self.labels, self.cond, *args)

    def log_tilt_in_batches(self, x_0: Tensor) -> Tensor:
        """Return w r (n,) of x_0 (n, *), batch by batch: decoded images are many times their latents."""
        batches = parts(len(x_0), default_batch(self.denoiser))
        return torch.cat([self.rows(rows).log_tilt(x_0[rows]) for rows in batches])


@dataclass(kw_only=True)
class Method(ABC):
    """Sample a prior under a reward."""

    eta: float = 1.0  # churn of the chain
    batch: int | None = None  # paths at a time; None for `default_batch`

    def __call__(
        self, denoiser: Denoiser, reward: Reward, labels: Labels, cond: Cond | None, times: Times,
        generator: torch.Generator, strength: float = 1.0,
    ) -> Samples:  # fmt: skip
        """Draw a sample for each row of the labels.

        Args:
            denoiser: the prior; for `FreeGuidance` a policy.
            reward: γ log p̂(y | x_0).
            labels, cond: B rows each; a null label earns no reward.
            times, generator: the chain's grid, and the generator of all noise.
            strength: w, which multiplies the reward; 0 is the prior.
        """
        with torch.no_grad(), counted(denoiser, self.guiding_reward(reward)) as (rows, counted_reward):
            target = Target(denoiser, counted_reward, labels, cond or {}, strength, lambda: reward.bound(labels))
            x_0 = (self.sample if strength else self.sample_prior)(target, times, generator)
        return Samples(x_0, Cost(**{field.name: rows[field.name] / len(target) for field in fields(Cost)}))

    def sample_prior(self, target: Target, times: Times, generator: torch.Generator) -> Tensor:
        """Draw samples x_0 (n, *) of the prior on the CPU, under the target's conditions."""
        prior = target.denoiser.prior
        return paths(prior, len(target), times, generator, target.cond, eta=self.eta, batch=self.batch).x_0

    def guiding_reward(self, reward: Reward) -> RewardFunction:
        """Return what the method evaluates in the reward's place."""
        return reward

    @abstractmethod
    def sample(self, target: Target, times: Times, generator: torch.Generator) -> Tensor:
        """Draw x_0 (n, *) on the CPU at a strength that is not 0."""
