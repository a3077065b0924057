"""Simulate the policy's own paths, for learners that learn from them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chain.denoise import loss_scale
from ..chain.noise import normal
from ..chain.rollout import Times, Trajectory, rollout
from ..chain.rows import parts, rows_of
from ..chain.transition import Gaussian, transition
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..data.labels import Labels
from ..system import ranks
from .step import Learner


class Rollout(NamedTuple):
    """Hold B paths of the policy with their pairs (c, y), numbered as `Conditions` does, labels, conditions and γ."""

    path: Trajectory
    pair: Tensor  # (B,)
    labels: Labels
    cond: dict[str, Tensor]
    gamma: dict[str, Tensor]  # "gamma" (B,), an option of policy and reward; empty where there is a single γ

    @classmethod
    def from_parts(cls, batches: "list[Rollout]") -> "Rollout":
        """Concatenate the parts of a rollout."""
        paths, pairs, *values = zip(*batches, strict=True)
        joined = ({name: torch.cat([part[name] for part in rows]) for name in rows[0]} for rows in values)
        return cls(Trajectory.from_parts(list(paths)), torch.cat(pairs), *joined)


class OnPolicy(Learner):
    """Share what learners on the policy's own paths need; a batch is the paths of a rollout.

    Arguments as of `Learner`, and `eta`, the churn of the chain: positive, as u = (mean_g − mean_pre)/std.
    """

    def __init__(self, times: Times, batch: int | None = None, *, eta: float = 1.0, **options: Any) -> None:
        super().__init__(times, batch, **options)
        if not 0.0 < eta <= 1.0:
            raise ValueError(f"this learner needs noise in every step: eta must lie in (0, 1], got {eta}. Use 1.0.")
        self.eta, self.steps = eta, len(times) - 1

    @property
    def rows(self) -> slice:
        """This rank's, of the batch."""
        return ranks.rank_rows(self.batch)

    @property
    def weight(self) -> float:
        """Weight of a mean over this rank's rows in the mean over the batch."""
        return float(self.rows.stop - self.rows.start) / self.batch

    def storage(self, policy: Policy) -> torch.device:
        """Return the device that keeps the paths."""
        return policy.device

    def fresh_paths(
        self, policy: Policy, conditions: Conditions, generator: torch.Generator, **options: Any
    ) -> Iterator[Rollout]:
        """Yield this rank's new paths, `micro` at a time, which changes no noise; options as of `rollout`."""
        pair, shape = conditions.draw(self.batch, generator)[self.rows], (self.batch, *policy.shape)
        gamma = rows_of(conditions.draw_gamma(self.batch, generator), self.rows)
        like = torch.empty(0, device=self.storage(policy))
        noises = [normal(shape, like, generator, self.rows) for _ in self.times]
        for rows in parts(len(pair), self.micro):
            (labels, cond), row_gamma = conditions.of(pair[rows]), rows_of(gamma, rows)
            x_1, *noise = (z[rows].to(policy.device) for z in noises)
            options |= {"labels": labels, **row_gamma}
            path = rollout(policy, x_1, self.times, self.eta, cond=cond, noise=noise, **options)
            yield Rollout(path.to(like.device), pair[rows], labels, cond, row_gamma)


class Visit(NamedTuple):
    """Number the steps and paths of n transitions to learn from; `last` and `whole` as in `Step`."""

    step: Tensor  # (n,)
    row: Tensor  # (n,)
    last: bool
    whole: bool


class Revisiting(OnPolicy):
    """Share what learners need that keep the paths of a rollout for several updates, the setting `reuse`."""

    settings: Any

    def storage(self, policy: Policy) -> torch.device:
        return torch.device("cpu") if self.offload else policy.device

    def visits(self, steps: Tensor, share: int, generator: torch.Generator) -> Iterator[Visit]:
        """Yield the transitions of each update from a rollout, `micro` at a time.

        Every path goes through all of `steps` in a random order of its own, `share` of them an update, and then again.
        """
        order = steps[torch.rand(len(steps), self.batch, generator=generator).argsort(0)[:, self.rows]]
        for update in range(self.settings.reuse):
            step = order[(update * share + torch.arange(share)) % len(steps)]
            row = torch.arange(order.shape[1]).expand_as(step).flatten()
            for rows in parts(len(row), self.micro):
                last, whole = rows.stop == len(row), update == self.settings.reuse - 1
                yield Visit(step.flatten()[rows], row[rows], last, whole)


def revisit(policy: Policy, rollout: Rollout, visit: Visit, eta: float) -> Gaussian:
    """Return the policy's steps from the visited states as it would take them now."""
    times, row = torch.tensor(rollout.path.times, dtype=torch.float64), visit.row
    x_t = rollout.path.x[visit.step, row].to(policy.device)
    labels, options = rows_of(rollout.labels, row), rows_of(rollout.gamma | rollout.cond, row)
    return transition(policy, x_t, times[visit.step], times[visit.step + 1], eta, labels=labels, **options)


def check_gradient(rewards: Tensor) -> None:
    """Refuse rewards (B,) without a gradient: a learner that follows it would see the KL alone."""
    if torch.is_grad_enabled() and not rewards.requires_grad:
        raise ValueError("this reward has no gradient, which this learner follows. Train with weighted or ppo.")


def gradient_at(policy: Policy, value: Tensor, x_t: Tensor) -> Tensor:
    """Return ∇value at x_t (B, *), with the largest loss scale at which it is finite in half precision."""
    scale = loss_scale(policy)
    (gradient,) = torch.autograd.grad(scale * value, x_t, retain_graph=scale > 1)
    while scale > 1 and ranks.any_rank(not gradient.isfinite().all()):
        scale /= 16
        (gradient,) = torch.autograd.grad(scale * value, x_t, retain_graph=scale > 1)
    return gradient / scale


def clip_rows(a: Tensor, limit: float | Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows of a (B, *) down to norm `limit`; return them and which of them (B,) were longer."""
    norm = a.flatten(1).norm(dim=1)
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1.0)
    return a * factor.view(-1, *[1] * (a.ndim - 1)), norm > limit
