"""Define what a learner is: settings, what they cost, and a generator of losses.

Training is counted in evaluations of the network, so that a time buys the same updates whenever it is used again. An
evaluation with its gradient counts as three without: the forward pass, and a backward pass of twice its operations.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, overload

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor
from typing_extensions import Self

from ..chain.noise import normal
from ..chain.paths import PriorPaths
from ..chain.rollout import Times
from ..chain.rows import parts, rows_of
from ..chain.schedule import per_sample
from ..chain.transition import half_square
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..data.labels import Labels
from ..reward.reward import Reward
from ..system import ranks
from ..system.strict import Strict

WITH_BACKWARD = 3
TIMED = 3  # evaluations, of which the fastest counts
MOST = 2**20  # samples an update: more is a slip of the pen


class Evaluations(NamedTuple):
    """Count the network's evaluations for each sample of an update."""

    forward: int  # alone
    with_backward: int


class LearnerSettings(Strict):
    """Hold a learner's settings, and derive from them what an update costs.

    Args:
        updates: gradient steps; of the first learner of a run that follows its probes (`decay`) at most so many. Cost:
            time in proportion.
        batch: samples an update, or paths a rollout. Cost: time in proportion; memory too, which `micro_batch` bounds.
        lr_embedding: peak learning rate of the label's embedding.
        lr_adapter: peak learning rate of the LoRA adapter.
    """

    kept_states: ClassVar[int] = 0  # tensors like x_t that are kept of each step of each path
    updates: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr_embedding: float = Field(1e-2, gt=0)
    lr_adapter: float = Field(1e-3, gt=0)

    @field_validator("batch")
    @classmethod
    def _is_within_reason(cls, batch: int) -> int:
        if batch > MOST:
            raise ValueError(f"at most {MOST:,} samples can be asked of an update")
        return batch

    def stages(self, name: str) -> dict[str, Self]:
        """Return the settings of each stage in turn, by its name: the learner's, and any that prepare it."""
        return {name: self}

    def scaled(self, ratio: float) -> Self:
        """Return the settings with `ratio` times as many updates, at least one."""
        return self.model_copy(update={"updates": max(1, int(self.updates * ratio))})

    @property
    def drawn(self) -> int:
        """The number of the prior's samples that are drawn first, for each of its conditions."""
        return 0

    def numbers_kept(self, steps: int) -> int:
        """Count the tensors like x_0 that are kept of these samples, for each condition."""
        return self.drawn

    def rows_kept(self, micro: int | None) -> int:
        """Count the samples of which a gradient keeps a step at once, `micro` of them at most."""
        return min(self.batch, micro or self.batch)

    def evaluations(self, steps: int) -> Evaluations:
        """Count the evaluations of an update on a chain of so many steps, for each sample of the batch."""
        raise NotImplementedError


class CachedSettings(LearnerSettings):
    """Hold the settings of a learner that draws samples of the prior once and regresses on them.

    Args:
        cache: samples of the prior for each of its conditions; of a population in all. Cost: so many chains of the
            prior before the first update, and memory for them.
    """

    updates: int = Field(700, ge=1)
    lr_embedding: float = Field(5e-2, gt=0)
    cache: int = Field(1000, ge=1)

    @property
    def drawn(self) -> int:
        return self.cache


def cost_of_update(settings: LearnerSettings, steps: int) -> int:
    """Count the evaluations of one update on a chain of so many steps."""
    forward, with_backward = settings.evaluations(steps)
    return settings.batch * (forward + WITH_BACKWARD * with_backward)


@dataclass
class Step:
    """Hold a gradient step, or a part of it: a loss in nats to minimise and metrics to log.

    Both add up over parts and ranks, each of which has rows of its own, and are read once all parts are computed.
    """

    loss: Tensor
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    last: bool = True  # the step is taken after this part
    # no paths are left to use after this step: a new stream with the same generator and `carried` continues alike
    whole: bool = True


class PriorSampler(Protocol):
    """Draw samples of the prior, `members` for each condition in turn; of a population so many in all."""

    @overload
    def __call__(self, members: int) -> Tensor:
        """Return x_0 (G · members, *)."""
        ...

    @overload
    def __call__(self, members: int, states: int) -> PriorPaths:
        """Return paths with so many states of each."""
        ...


# what a learner keeps from one batch of paths to the next, in a list that it changes in place; None keeps nothing
Carried = list[Tensor] | None


class Learner(ABC):
    """Turn a policy, a reward and conditions into losses without end: one file and one row of `table.LEARNERS`.

    Args:
        times: the chain's grid.
        batch: samples an update; None for the default of the settings.
        micro: samples that go through the network at once while a gradient is kept; None for all.
        offload: keep in CPU memory what several updates use, all but the rows of a micro-batch.
        values: the other `Settings`, by name, which declare their defaults and bounds.
    """

    Settings: ClassVar[type[LearnerSettings]]
    differentiates: ClassVar[bool] = False  # whether it needs the gradient of the reward

    def __init__(
        self, times: Times, batch: int | None = None, *, micro: int | None = None, offload: bool = False, **values: Any
    ) -> None:
        self.times, self.micro, self.offload = times, micro, offload
        self.settings = self.Settings(**values if batch is None else {"batch": batch, **values})
        self.batch = self.settings.batch

    @classmethod
    def from_settings(
        cls, settings: LearnerSettings, times: Times, prior_samples: PriorSampler, **options: Any
    ) -> Self:
        """Make a learner of an instance of `Settings`."""
        return cls(times, **options, **dict(settings))

    @abstractmethod
    def __call__(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator, carried: Carried = None
    ) -> Iterator[Step]:
        """Yield losses without end."""


def steps_to_learn(policy: Policy, times: Times) -> Tensor:
    """Return the steps of the chain at which a control that is trained speaks; refuse (ValueError) if there is none."""
    active = policy.active_steps(times)
    if not len(active):
        first, last = (float(policy.schedule(t)[1]) for t in (times[0], times[-2]))
        intervals = ", ".join(f"{name} {c.interval}" for name, c in policy.controls.items() if not c.fixed) or "none"
        steps = f"none of the chain's {len(times) - 1} steps, which begin at σ = {first:.3g} … {last:.3g}"
        raise ValueError(f"no control that is trained speaks at {steps}; their intervals: {intervals}. Widen them.")
    return active


class States(NamedTuple):
    """Hold a batch of states with the times (B,) they are of."""

    x_t: Tensor
    t: Tensor


def even_steps(steps: Tensor, batch: int, generator: Generator) -> Tensor:
    """Draw one of the steps for each row of a batch (B,), every step equally often."""
    offset = torch.rand((), generator=generator)
    position = torch.randperm(batch, generator=generator) + offset
    return steps[(position * len(steps) / batch).long().clamp(max=len(steps) - 1)]


def noised(policy: Policy, x_0: Tensor, times: Times, batch: int, generator: Generator) -> States:
    """Add noise to this rank's share x_0 (n, *) of a batch, at every step to learn equally often."""
    share = ranks.rank_rows(batch)
    step = even_steps(steps_to_learn(policy, times), batch, generator)
    t = torch.tensor(times, dtype=torch.float64)[step][share]
    alpha, sigma = policy.schedule(t)
    noise = normal((batch, *x_0.shape[1:]), x_0, generator, share)
    return States(per_sample(alpha, x_0) * x_0 + per_sample(sigma, x_0) * noise, t)


def regression(
    policy: Policy, x_0: Tensor, states: States, labels: Labels, cond: dict[str, Tensor], batch: int,
    micro: int | None, learned_renoising: list[Tensor] | None = None, gamma: dict[str, Tensor] | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Regress x̂ at states on x_0 (n, *), this rank's share of a batch.

    Yields ½‖(x̂ − x_0)/σ_t‖², `micro` rows at a time; the effect of re-noising is subtracted, if controls learned it.
    `gamma` is what `Conditions.draw_gamma` drew for these rows.
    """
    x_t, t = states
    sigma = policy.schedule(t)[1]
    for rows in parts(len(x_0), micro):
        x, target, row_cond = x_t[rows], x_0[rows], rows_of(cond, rows)
        inputs = {"labels": rows_of(labels, rows), **rows_of(gamma or {}, rows), **row_cond}
        with policy.prior.straight_through():
            if learned_renoising is not None:
                with torch.no_grad(), policy.holding(learned_renoising):
                    target = target - policy(x, t[rows], **inputs) + policy.prior(x, t[rows], **row_cond)
            loss = half_square((policy(x, t[rows], **inputs) - target) / per_sample(sigma[rows], x)).sum()
        yield Step(loss / batch, last=rows.stop == len(x_0))


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
