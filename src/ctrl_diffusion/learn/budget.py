"""Count training in evaluations of the network, so that a time buys the same updates whenever it is used again.

An evaluation with its gradient counts as three without: the forward pass, and a backward pass of twice its operations.
"""

import re
import time
from typing import NamedTuple

import torch

from ..chain.rollout import Times
from ..chain.rows import parts, rows_of
from ..control.conditions import Conditions
from ..control.policy import Policy
from .step import LearnerSettings, steps_to_learn

WITH_BACKWARD = 3
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}
TIMED = 3  # evaluations, of which the fastest counts


def seconds_in(text: str) -> float:
    """Read a time such as 90s, 30m or 1h30m; raise ValueError for another text."""
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip())
    try:
        seconds = sum(float(n) * unit for n, unit in zip(match.groups(), UNITS.values(), strict=True) if n)
    except (AttributeError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{text!r} is no time. Give one such as 90s, 30m, 1h or 1h30m.")
    return seconds


def cost_of_update(settings: LearnerSettings, steps: int) -> int:
    """Count the evaluations of one update on a chain of so many steps."""
    forward, with_backward = settings.evaluations(steps)
    return settings.batch * (forward + WITH_BACKWARD * with_backward)


class Speed(NamedTuple):
    """Hold the seconds of the network's evaluations, for each sample."""

    forward: float  # alone
    with_backward: float

    def of_update(self, settings: LearnerSettings, steps: int) -> float:
        """Predict the seconds of one update."""
        forward, with_backward = settings.evaluations(steps)
        return settings.batch * (forward * self.forward + with_backward * self.with_backward)


def measure_speed(policy: Policy, times: Times, conditions: Conditions, batch: int, micro: int | None = None) -> Speed:
    """Time the policy on a batch of zeros, `micro` rows at once, without and with the gradient of its controls."""
    steps = steps_to_learn(policy, times)
    t, x_t = times[int(steps[len(steps) // 2])], torch.zeros(batch, *policy.shape, device=policy.device)
    labels, cond = conditions.of(torch.arange(batch) % conditions.pairs)

    def evaluate(backward: bool) -> float:
        begin = time.perf_counter()
        for rows in parts(batch, micro):
            x_hat = policy(x_t[rows], t, labels=rows_of(labels, rows), **rows_of(cond, rows))
            if backward:
                x_hat.square().sum().backward()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    fastest = []
    for backward in (False, True):
        with torch.set_grad_enabled(backward):
            fastest.append(min(evaluate(backward) for _ in range(TIMED)) / batch)
    for p in policy.trainable():
        p.grad = None
    return Speed(*fastest)
