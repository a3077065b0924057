"""Learners: each turns (policy, reward, conditions) into a stream of losses; `train.fit` steps on them."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Step:
    """One gradient step's worth: a loss in nats to minimise and figures to log."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
