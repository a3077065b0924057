"""Simulate the policy's own paths for the learners that learn from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chain.denoise import loss_scale
from ..chain.noise import EVERY, normal
from ..chain.rollout import Times, Trajectory, rollout
from ..chain.rows import parts, rows_of
from ..chain.transition import Gaussian, transition
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..data.labels import Labels
from ..system import ranks


@dataclass
class OnPolicy:
    """What learners on the policy's own paths share.

    Args:
        times: the chain's grid.
        batch: paths a rollout.
        eta: churn of the chain; must be positive.
        micro: samples that go through the network at once while a gradient is asked for; None for all.
        offload: keep the paths of a rollout in CPU memory, all but those of a micro-batch.

    Raises:
        ValueError: steps without noise: u = (mean_g − mean_pre)/std would divide by nothing.
    """

    times: Times
    batch: int
    eta: float = 1.0
    micro: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.eta <= 1.0:
            raise ValueError(
                f"this learner needs noise in every step: eta must lie in (0, 1], got {self.eta}. Use 1.0."
            )

    @property
    def steps(self) -> int:
        """Of the chain."""
        return len(self.times) - 1

    @property
    def mine(self) -> slice:
        """This rank's rows of the batch."""
        return ranks.rank_rows(self.batch)

    @property
    def weight(self) -> float:
        """Of a mean over this rank's rows in that over the batch."""
        return (self.mine.stop - self.mine.start) / self.batch

    def home(self, policy: Policy) -> torch.device:
        """Where paths are kept."""
        return torch.device("cpu") if self.offload else policy.device

    def fresh_paths(
        self, policy: Policy, conditions: Conditions, generator: torch.Generator, **options: Any
    ) -> Iterator[tuple[Trajectory, Tensor, Labels, dict[str, Tensor]]]:
        """This rank's paths of the policy from new noise, with their pairs (c, y), labels and conditions; options of
        `rollout`.

        `micro` at a time; what is drawn does not depend on it.
        """
        pair, shape = conditions.draw(self.batch, generator)[self.mine], (self.batch, *policy.shape)
        home = torch.empty(0, device=self.home(policy))
        drawn = [normal(shape, home, generator, self.mine) for _ in self.times]
        for rows in parts(len(pair), self.micro):
            labels, cond = conditions.of(pair[rows])
            x_1, *noise = (z[rows].to(policy.device) for z in drawn)
            path = rollout(policy, x_1, self.times, self.eta, cond=cond, noise=noise, labels=labels, **options)
            yield path.to(home.device), pair[rows], labels, cond


def check_gradient(earned: Tensor) -> None:
    """Refuse rewards (B,) that know nothing of x: a learner that follows their gradient would see the KL alone."""
    if torch.is_grad_enabled() and not earned.requires_grad:
        raise ValueError("this reward has no gradient, which this learner follows. Train with weighted or ppo.")


def pulled_back(policy: Policy, value: Tensor, x_t: Tensor) -> Tensor:
    """∇value at x_t (B, *), scaled on its way as far as half precision needs and bears."""
    scale = loss_scale(policy)
    (gradient,) = torch.autograd.grad(scale * value, x_t, retain_graph=scale > 1)
    while scale > 1 and ranks.any_rank(not gradient.isfinite().all()):
        scale /= 16
        (gradient,) = torch.autograd.grad(scale * value, x_t, retain_graph=scale > 1)
    return gradient / scale


def clip_rows(a: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows of a (B, *) down to norm `limit`; also says which rows (B,) were longer."""
    norm = a.flatten(1).norm(dim=1)
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1.0)
    return a * factor.view(-1, *[1] * (a.ndim - 1)), norm > limit


def joined(
    drawn: list[tuple[Trajectory, Tensor, Labels, dict[str, Tensor]]],
) -> tuple[Trajectory, Labels, dict[str, Tensor]]:
    """The parts of a rollout as one, with its labels and conditions."""
    paths, _, labels, conds = zip(*drawn, strict=True)
    return (
        Trajectory.from_parts(list(paths)),
        {name: torch.cat([part[name] for part in labels]) for name in labels[0]},
        {name: torch.cat([part[name] for part in conds]) for name in conds[0]},
    )


def visits(
    steps: int, paths: int, share: int, generator: torch.Generator, mine: slice = EVERY
) -> Iterator[tuple[Tensor, Tensor]]:
    """Transitions of a rollout to learn from, update by update: steps and paths (share · paths,), without end.

    With `mine` those of some of the paths, which are counted among themselves.

    Every path goes through its steps in an order of its own, `share` of them an update, so that each is met once before
    any is met again and an update sees all steps.
    """
    order = torch.rand(steps, paths, generator=generator).argsort(0)[:, mine]
    row, start = torch.arange(order.shape[1]), 0
    while True:
        i = order[(start + torch.arange(share)) % steps]
        yield i.flatten(), row.expand_as(i).flatten()
        start += share


def revisit(
    policy: Policy, path: Trajectory, i: Tensor, row: Tensor, labels: Labels, cond: dict[str, Tensor], eta: float
) -> Gaussian:
    """The steps i of paths `row` (n,) as the policy would take them now."""
    t_grid = torch.tensor(path.times, dtype=torch.float64)
    own = {"labels": rows_of(labels, row), **rows_of(cond, row)}
    return transition(policy, path.x[i, row].to(policy.device), t_grid[i], t_grid[i + 1], eta, **own)
