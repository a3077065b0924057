"""Regress on the prior's own paths: the label they end with, against a label they might have ended with.

Draw paths from the prior once. At a state x_t of a path with end x_0 draw a label y ~ p̂(y | x_0)^γ, and a label y' that
could have come of x_t as well, from the outlook p(y | x_t). With r = (x_0 − x̂_pre)/σ_t and the control's effect
d_y = (x̂_g(x_t, y) − x̂_pre)/σ_t the loss is

    ½‖d_y‖² − (d_y − d_y')·r,  least for σ_t d_y = E[x_0 | x_t, c, y] − E[x_0 | x_t, c].

An update costs a training step and finds every mode, as `weighted` does. Two things differ:

- A chain of few steps, a clipped x̂ or a network that is not exact have x̂_pre ≠ E[x_0 | x_t] on their own paths. That
  difference is the same for every label; learned, it would be KL for nothing. Here it cancels.
- Where y is decided y' = y, and there is little noise.

A label is drawn as often as any other, and its paths with weights p̂^γ / E[p̂^γ]; the terms of y' are weighted such that
E[x_0 | x_t, c] is the prior's.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor
from typing_extensions import Self

from ..chain.paths import PriorPaths
from ..chain.rollout import Times
from ..chain.rows import parts, rows_of
from ..chain.schedule import per_sample
from ..chain.transition import half_square
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..data.labels import NULL
from ..reward.outlook import outlook
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
    even_steps,
    steps_to_learn,
)

MOST_WEIGHT = 10.0  # of the terms of y': more would be noise, where a label is rare


class Contrast(Learner):
    """Learn from states of the prior's own paths.

    Args:
        paths: of the prior with states and x̂, M for each of the G conditions in turn; of a population M in all, under
            the conditions of `Conditions.spread`.
        times, batch, options: see `Learner`; a batch has so many states.
    """

    class Settings(CachedSettings):
        """Hold the settings of `Contrast`.

        Args:
            states: states kept of each path of the prior, each with x̂; of a shorter chain all. Cost: memory, twice that
                of x_0 for each state.
        """

        batch: int = Field(64, ge=1)
        lr_adapter: float = Field(4e-3, gt=0)
        states: int = Field(40, ge=1)

        def numbers_kept(self, steps: int) -> int:
            return self.cache * (1 + 2 * min(self.states, steps))

        def evaluations(self, steps: int) -> Evaluations:
            return Evaluations(0, 2)

        def rows_kept(self, micro: int | None) -> int:
            return min(2 * self.batch, micro or 2 * self.batch)

    def __init__(self, paths: PriorPaths, times: Times, batch: int | None = None, **options: Any) -> None:
        super().__init__(times, batch, **options)
        self.paths = paths

    @classmethod
    def from_settings(
        cls, settings: LearnerSettings, times: Times, prior_samples: PriorSampler, **options: Any
    ) -> Self:
        assert isinstance(settings, Contrast.Settings)
        return cls(prior_samples(settings.cache, states=settings.states), times, **options, **dict(settings))

    def __call__(
        self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator, carried: Carried = None
    ) -> Iterator[Step]:
        steps_to_learn(policy, self.times)  # refuses a chain on which nothing speaks
        table = LabelTable.from_paths(reward, conditions, self.paths)
        share, times = ranks.rank_rows(self.batch), torch.tensor(self.times, dtype=torch.float64)
        columns = torch.arange(self.paths.steps.shape[1])
        while True:
            pair = conditions.draw(self.batch, generator)[share]
            gamma = rows_of(conditions.draw_gamma(self.batch, generator), share)
            quantile, other = torch.rand(2, self.batch, 1, generator=generator, dtype=torch.float64)[:, share]
            cell = conditions.cell(pair, **gamma)
            row = table.path(cell, quantile)
            column = even_steps(columns, self.batch, generator)[share]
            label, weight = table.other(cell, row, column, other)
            pair, others = (conditions.pair_of(y, row, len(self.paths.x_0)) for y in (cell, label))
            t = times[self.paths.steps[row, column]]
            for rows in parts(len(pair), self.micro and max(1, self.micro // 2)):
                at = row[rows], column[rows]
                state = State(*(v.to(policy.device) for v in (self.paths.x_0[at[0]], self.paths.x_hat[at])))
                x_t, both = self.paths.states[at].to(policy.device), (pair[rows], others[rows])
                loss = contrast(policy, conditions, x_t, t[rows], both, state, weight[rows], rows_of(gamma, rows))
                yield Step(loss / self.batch, last=rows.stop == len(pair))


class State(NamedTuple):
    """Hold where paths end, and what the prior predicts at their states."""

    x_0: Tensor  # (n, *)
    x_hat: Tensor  # (n, *)


def contrast(
    policy: Policy, conditions: Conditions, x_t: Tensor, t: Tensor, pairs: tuple[Tensor, Tensor], state: State,
    weight: Tensor, gamma: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """Return the sum of the loss over states x_t (n, *) at times t (n,); where both pairs are one it is called once.

    `pairs` are (c, y) and (c, y'), (n,) each; `weight` (n,) is that of the terms of y'.
    """
    first, second = pairs
    differ = (first != second).nonzero().squeeze(1)
    rows = torch.cat([torch.arange(len(first)), differ])
    labels, cond = conditions.of(torch.cat([first, second[differ]]))
    with policy.prior.straight_through():
        x_hat = policy(x_t[rows], t[rows], labels=labels, **rows_of(gamma, rows), **cond)
    sigma = per_sample(policy.schedule(t)[1], x_t)
    effect = ((x_hat - state.x_hat[rows]) / sigma[rows]).flatten(1)
    r = ((state.x_0 - state.x_hat) / sigma).flatten(1)
    d, d_other = effect.split([len(first), len(differ)])
    share = torch.where(first == second, 1 - weight, 1.0).to(effect)  # a y' that is y has the effect of y
    own = half_square(d) - share * (d * r).sum(1)
    loss: Tensor = own.sum() + (weight[differ].to(effect) * (d_other * r[differ]).sum(1)).sum()
    return loss


class LabelTable(NamedTuple):
    """Hold what labels the prior's paths end with, and which ones their states could lead to."""

    conditions: Conditions
    weights: Tensor  # (cells, M), p̂^γ / E[p̂^γ] of each path of the cell's condition
    cumulated: Tensor  # (cells, M), their shares, summed up
    outlooks: Tensor  # (γ, G · M, states, J), of the J labels of all controls together
    agrees: Tensor  # (J, K), whether a label of all controls has the classes of a label of some
    frequencies: Tensor  # (cells,), E[p̂^γ] over the E[Σ_y p̂^γ] of the controls that act

    @classmethod
    @torch.no_grad()
    def from_paths(cls, reward: Reward, conditions: Conditions, paths: PriorPaths) -> Self:
        """Tabulate p̂^γ at the ends of paths, and the outlook at their states."""
        gammas = conditions.gammas or (reward.gamma,)
        plain, labels, choice = reward.at(1.0), conditions.combinations, conditions.choice
        table = prior_table(plain, conditions, paths.x_0)  # (G, M, K)
        warn_of_rare(conditions, table, "contrast", 1.0)
        p = torch.cat([gamma * table.double() for gamma in gammas]).transpose(1, 2)  # (γ · G, K, M)
        shares = p.softmax(2).flatten(0, 1)
        mean = p.exp().mean(2)  # (γ · G, K)
        frequencies = mean / (mean[:, None] * (choice[:, None] == choice)).sum(2)
        full = (labels != NULL).all(1)  # the labels of all controls together
        outlooks = outlook(plain, conditions, paths, table[..., full].flatten(0, 1), gammas)
        agrees = ((labels[full][:, None] == labels) | (labels == NULL)).all(2).double()
        return cls(conditions, shares * shares.shape[1], shares.cumsum(1), outlooks, agrees, frequencies.flatten())

    def path(self, cell: Tensor, quantile: Tensor) -> Tensor:
        """Return paths (n,) of cells (n,), each as often as its weight, at quantiles (n, 1)."""
        member = torch.searchsorted(self.cumulated[cell], quantile).squeeze(1).clamp(max=self.members - 1)
        return self.conditions.row_of(cell, member, self.members)

    @property
    def members(self) -> int:
        """M."""
        return self.weights.shape[1]

    def other(self, cell: Tensor, path: Tensor, column: Tensor, quantile: Tensor) -> tuple[Tensor, Tensor]:
        """Draw y' (n,) at states (path, column) of cells (n,); return them and the weights of their terms."""
        strata, classes, choice = self.conditions.strata, self.conditions.classes, self.conditions.choice
        first = cell - cell % classes  # the cell of label 0, at the same c and γ
        cells = first[:, None] + torch.arange(classes)
        among = choice[cell % classes][:, None] == choice  # (n, K), the labels of the same controls
        likely = self.outlooks[cell // strata, path, column].double() @ self.agrees
        relative = among * likely / self.frequencies[cells]  # p(y | x_t) over p(y)
        drawn = relative.cumsum(1) / relative.sum(1, keepdim=True)
        y = torch.searchsorted(drawn, quantile).squeeze(1).clamp(max=classes - 1)
        at_end = (among * self.weights[cells, (path % self.members)[:, None]]).sum(1)
        return y, (relative.sum(1) / at_end).clamp(max=MOST_WEIGHT)
