"""Learners: each turns (policy, reward, conditions) into a stream of losses; `train.fit` steps on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..conditions import Conditions
from ..control import Labels, Policy
from ..rollout import Times, Trajectory, rollout
from ..transition import Gaussian, transition


@dataclass
class Step:
    """One gradient step's worth: a loss in nats to minimise and figures to log."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


# (policy, reward, conditions, generator) → losses without end
Learner = Callable[..., Iterator[Step]]


@dataclass
class OnPolicy:
    """What learners on the policy's own paths share.

    Args:
        times: the chain's grid.
        batch: paths a rollout.
        eta: churn of the chain; must be positive.

    Raises:
        ValueError: steps without noise: u = (mean_g − mean_pre)/std would divide by nothing.
    """

    times: Times
    batch: int
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.eta <= 1.0:
            raise ValueError(
                f"this learner needs noise in every step: eta must lie in (0, 1], got {self.eta}. Use 1.0."
            )

    @property
    def steps(self) -> int:
        """Of the chain."""
        return len(self.times) - 1

    def fresh_paths(
        self, policy: Policy, conditions: Conditions, generator: torch.Generator, **options: Any
    ) -> tuple[Trajectory, Tensor, Labels, dict[str, Tensor]]:
        """Paths of the policy from new noise, with their pairs (c, y), labels and conditions; options of `rollout`."""
        pair = conditions.draw(self.batch, generator)
        labels, cond = conditions.of(pair)
        x_1 = torch.randn(self.batch, *policy.shape, generator=generator)
        path = rollout(policy, x_1, self.times, self.eta, generator, cond=cond, labels=labels, **options)
        return path, pair, labels, cond


def check_gradient(earned: Tensor) -> None:
    """Refuse rewards (B,) that know nothing of x: a learner that follows their gradient would see the KL alone."""
    if torch.is_grad_enabled() and not earned.requires_grad:
        raise ValueError("this reward has no gradient, which this learner follows. Train with weighted or ppo.")


def clip_rows(a: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows of a (B, *) down to norm `limit`; also says which rows (B,) were longer."""
    norm = a.flatten(1).norm(dim=1)
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1.0)
    return a * factor.view(-1, *[1] * (a.ndim - 1)), norm > limit


def visits(steps: int, paths: int, share: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Transitions of a rollout to learn from, update by update: steps and paths (share · paths,), without end.

    Every path goes through its steps in an order of its own, `share` of them an update, so that each is met once before
    any is met again and an update sees all steps.
    """
    order = torch.rand(steps, paths, generator=generator).argsort(0)
    row, start = torch.arange(paths), 0
    while True:
        i = order[(start + torch.arange(share)) % steps]
        yield i.flatten(), row.expand_as(i).flatten()
        start += share


def revisit(
    policy: Policy, path: Trajectory, i: Tensor, row: Tensor, labels: Labels, cond: dict[str, Tensor], eta: float
) -> Gaussian:
    """The steps i of paths `row` (n,) as the policy would take them now."""
    t_grid = torch.tensor(path.times, dtype=torch.float64)
    own = {"labels": {name: y[row] for name, y in labels.items()}, **{name: c[row] for name, c in cond.items()}}
    return transition(policy, path.x[i, row], t_grid[i], t_grid[i + 1], eta, **own)
