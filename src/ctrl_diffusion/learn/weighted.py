"""Reward-weighted regression: the warm start.

Draw x_0 from the prior once. For a pair (c, y) the target is those samples weighted by w = p̂(y | x_0)^γ, so draw from
them by weight, add noise and regress the denoiser, ½‖(x̂_g(x_t) − x_0)/σ_t‖² at the times of the chain. It costs a plain
training step and finds every mode (the cross-entropy method of stochastic control). With re-noising taken as the
reverse of the prior's chain its solution E[x_0 | x_t, c, y] minimises the forward KL of paths.

The weight 1/σ_t² makes it the squared error of v, for diffusion and flow alike. The weights of the forward KL in nats
have the same solution, but put nearly all of the loss on late steps, where y is long decided and only noise is left to
learn (docs/lab-notes.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..chain.rollout import Times
from ..chain.rows import parts, rows_of
from ..chain.schedule import per_sample
from ..chain.transition import half_square
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..reward.reward import Reward, prior_table
from ..system import ranks
from .step import Carried, LearnerSettings, Step, renoised

RENOISING = "re-noising"  # the name of the stage that learns what is taken off


@dataclass
class Weighted:
    """The learner.

    Args:
        x_0: (G · M, *), samples of the prior, M for each of the G conditions in turn.
        times: the chain's grid.
        batch: samples an update.
        even: learn at w ≡ 1 what re-noising alone does to the prior, whatever the label.
        renoising: a snapshot of the policy's controls that learned it; None takes nothing off.
        micro: samples that go through the network at once; None for all.
    """

    x_0: Tensor
    times: Times
    batch: int = 256
    even: bool = False
    renoising: list[Tensor] | None = None
    micro: int | None = None

    def __call__(
        self,
        policy: Policy,
        reward: Reward,
        conditions: Conditions,
        generator: torch.Generator,
        carried: Carried = None,
    ) -> Iterator[Step]:
        """Losses without end."""
        with torch.no_grad():
            table = prior_table(reward, conditions, self.x_0)
            weights = (torch.zeros_like(table) if self.even else table).softmax(1)  # (G, M, K)
        # for each pair the cumulated weights over its condition's samples
        cumulated, members = weights.transpose(1, 2).flatten(0, 1).double().cumsum(1), weights.shape[1]
        mine = ranks.rank_rows(self.batch)
        while True:
            pair = conditions.draw(self.batch, generator)[mine]
            labels, cond = conditions.of(pair)
            ticket = torch.rand(self.batch, 1, generator=generator, dtype=torch.float64)[mine]
            member = torch.searchsorted(cumulated[pair], ticket).squeeze(1).clamp(max=members - 1)
            x_0 = self.x_0[pair // conditions.classes * members + member].to(policy.device)
            x_t, times, sigma = renoised(x_0, self.times, policy.schedule, generator, self.batch)
            for rows in parts(len(pair), self.micro):
                x, t, target = x_t[rows], times[rows], x_0[rows]
                own = {"labels": rows_of(labels, rows), **rows_of(cond, rows)}
                if self.renoising is not None:
                    with torch.no_grad(), policy.holding(self.renoising):
                        target = target - policy(x, t, **own) + policy.prior(x, t, **rows_of(cond, rows))
                miss = half_square((policy(x, t, **own) - target) / per_sample(sigma[rows], x))
                yield Step(miss.sum() / self.batch, last=rows.stop == len(pair))


class WeightedSettings(LearnerSettings):
    """`learn/weighted.py`; `cache` is the number of prior samples for each of the prior's conditions, `renoising` the
    updates at w ≡ 1 that come first, 0 for none."""

    updates: int = Field(700, ge=1)
    batch: int = Field(128, ge=1)
    lr_embedding: float = Field(5e-2, gt=0)
    lr_adapter: float = Field(2e-3, gt=0)
    cache: int = Field(1000, ge=1)
    renoising: int = Field(175, ge=0)
