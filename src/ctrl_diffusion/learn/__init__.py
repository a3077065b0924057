"""Learners: each turns (policy, reward, conditions) into a stream of losses; `train.fit` steps on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Step:
    """One gradient step's worth: a loss in nats to minimise and figures to log."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


# (policy, reward, conditions, generator) → losses without end
Learner = Callable[..., Iterator[Step]]


def clip_rows(a: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Scale rows of a (B, *) down to norm `limit`; also says which rows (B,) were longer."""
    norm = a.flatten(1).norm(dim=1)
    factor = (limit / norm.clamp(min=1e-12)).clamp(max=1.0)
    return a * factor.view(-1, *[1] * (a.ndim - 1)), norm > limit
