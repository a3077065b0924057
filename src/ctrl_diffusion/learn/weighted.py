"""Regress on reward-weighted samples of the prior.

Draw samples from the prior once; for each (c, y) and γ draw from them by weight w = p̂(y | x_0)^γ, add noise, and
regress the denoiser, ½‖(x̂_g(x_t) − x_0)/σ_t‖². An update costs a plain training step and finds every mode (the
cross-entropy method of stochastic control). The solution is E[x_0 | x_t, c, y]; it minimises the forward KL of paths if
the prior's chain is the reverse of adding noise. A trained prior's is so nearly: the difference is learned first, at
w ≡ 1, and subtracted. `contrast` learns from the prior's own paths, where there is none.

The weight 1/σ_t² makes the loss the squared error of v, for diffusion and flow alike. The weights of the forward KL in
nats have the same solution, but put nearly all of the loss on late steps, where y is long decided and only noise is
left to learn (docs/why/lab-notes.md).
"""

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from pydantic import Field
from torch import Generator, Tensor
from typing_extensions import Self

from ..chain.rollout import Times
from ..chain.rows import rows_of
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..reward.reward import Reward, prior_table, warn_of_rare
from ..system import ranks
from .step import (
    CachedSettings,
    Carried,
    Evaluations,
    Learner,
    LearnerSettings,
    PriorSampler,
    Step,
    noised,
    regression,
)

RENOISING = "re-noising"  # the stage that learns what is subtracted


class Weighted(Learner):
    """Learn by reward-weighted regression.

    Args:
        x_0: (G · M, *), samples of the prior, M for each of the G conditions in turn; of a population (M, *), under
            the conditions of `Conditions.spread`.
        times, batch, options: see `Learner`.
        even: learn at w ≡ 1, where the effect of re-noising alone is left, the same for every label.
        learned_renoising: a snapshot of the controls after training at w ≡ 1, whose effect is subtracted; or None.
    """

    class Settings(CachedSettings):
        """Hold the settings of `Weighted`.

        Args:
            renoising: updates at w ≡ 1 that come first and whose effect is subtracted; 0 for none. Cost: time of as
                many updates, and two evaluations more for each later sample.
        """

        batch: int = Field(128, ge=1)
        lr_adapter: float = Field(2e-3, gt=0)
        renoising: int = Field(175, ge=0)

        def stages(self, name: str) -> dict[str, Self]:
            first = self.model_copy(update={"updates": self.renoising, "renoising": 0})
            return {**({RENOISING: first} if self.renoising else {}), name: self}

        def scaled(self, ratio: float) -> Self:
            return super().scaled(ratio).model_copy(update={"renoising": int(self.renoising * ratio)})

        def evaluations(self, steps: int) -> Evaluations:
            # the effect of re-noising takes x̂ of the control that learned it, and of the prior
            return Evaluations(2 if self.renoising else 0, 1)

    def __init__(
        self, x_0: Tensor, times: Times, batch: int | None = None, *, even: bool = False,
        learned_renoising: list[Tensor] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(times, batch, **options)
        self.x_0, self.even, self.learned_renoising = x_0, even, learned_renoising

    @classmethod
    def from_settings(
        cls, settings: LearnerSettings, times: Times, prior_samples: PriorSampler, **options: Any
    ) -> Self:
        assert isinstance(settings, Weighted.Settings)
        return cls(prior_samples(settings.cache), times, **options, **dict(settings))

    def at_even_weights(self) -> Self:
        """Return the learner of re-noising alone, on the same samples."""
        learner = copy(self)
        learner.even = True
        return learner

    def __call__(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator, carried: Carried = None
    ) -> Iterator[Step]:
        with torch.no_grad():
            plain = reward.at(1.0) if conditions.gammas else reward
            table = prior_table(plain, conditions, self.x_0)
            if not self.even:
                warn_of_rare(conditions, table, "weighted", plain.gamma)
            if conditions.gammas:  # one table for each γ in turn
                table = torch.cat([gamma * table for gamma in conditions.gammas])
            weights = (torch.zeros_like(table) if self.even else table).softmax(1)  # (G, M, K)
        # for each pair, at each γ, the cumulated weights over its condition's samples
        cumulated, members = weights.transpose(1, 2).flatten(0, 1).double().cumsum(1), weights.shape[1]
        share = ranks.rank_rows(self.batch)
        while True:
            pair = conditions.draw(self.batch, generator)[share]
            gamma = rows_of(conditions.draw_gamma(self.batch, generator), share)
            quantile = torch.rand(self.batch, 1, generator=generator, dtype=torch.float64)[share]
            cell = conditions.cell(pair, **gamma)
            member = torch.searchsorted(cumulated[cell], quantile).squeeze(1).clamp(max=members - 1)
            row = conditions.row_of(cell, member, members)
            labels, cond = conditions.of(conditions.pair_of(cell, row, len(self.x_0)))
            x_0 = self.x_0[row].to(policy.device)
            states = noised(policy, x_0, self.times, self.batch, generator)
            sizes = self.batch, self.micro
            yield from regression(policy, x_0, states, labels, cond, *sizes, self.learned_renoising, gamma)
