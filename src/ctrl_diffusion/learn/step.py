"""Say what a learner is: a generator of losses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from ..chain.noise import normal
from ..chain.rollout import Times
from ..chain.schedule import Schedule, per_sample
from ..system import ranks
from ..system.strict import Strict


class LearnerSettings(Strict):
    """What every learner has: updates, samples an update, and a peak learning rate for each group of parameters."""

    updates: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr_embedding: float = Field(1e-2, gt=0)
    lr_adapter: float = Field(1e-3, gt=0)


@dataclass
class Step:
    """A gradient step's worth, or a part of it: a loss in nats to minimise and figures to log, both of which add up and
    are read once all of the step is on its way to the device.

    Of several ranks each gives the parts of its own rows. The step is taken after its last part. After a `whole` one no
    paths are left to be used: a stream begun anew, with the generator and what is `carried` (by all ranks) as they are
    then, goes on with the same losses.
    """

    loss: Tensor
    metrics: dict[str, float | Tensor] = field(default_factory=dict)
    last: bool = True
    whole: bool = True


# (policy, reward, conditions, generator, carried) → losses without end; `carried`, which may be left out, is a list in
# which a learner keeps what it takes along from one batch of paths to the next
Carried = list[Tensor] | None
Learner = Callable[..., Iterator[Step]]


def renoised(
    x_0: Tensor, times: Times, schedule: Schedule, generator: torch.Generator, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples with the noise of a chain's times, as many of each step as of any other; x_0 (n, *) is this rank's share
    of a batch.

    Returns:
        x_t (n, *); t and σ_t (n,), float64.
    """
    steps, n, mine = len(times) - 1, batch, ranks.rank_rows(batch)
    offset = torch.rand((), generator=generator)
    place = torch.randperm(n, generator=generator) + offset
    t = torch.tensor(times, dtype=torch.float64)[(place * steps / n).long().clamp(max=steps - 1)][mine]
    alpha, sigma = schedule(t)
    noise = normal((n, *x_0.shape[1:]), x_0, generator, mine)
    return per_sample(alpha, x_0) * x_0 + per_sample(sigma, x_0) * noise, t, sigma
