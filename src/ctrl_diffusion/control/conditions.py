"""Number the conditions (c, y) that a control is trained, certified and measured on.

Few conditions c are enumerated: each has samples of the prior of its own. A *population* has any number of them, and a
learner shares one pool of samples among all, each of its own c. With γ = 1 a pool of (c, x_0) in which y is drawn from
p̂(y | x_0, c), or rows of the pool by weight p̂^γ for a given y, has (c, x_0) of the joint p(c) p(x_0 | c) p̂^γ: what is
regressed on it at (x_t, c, y) does not depend on how often that (c, y) comes. Where a pool hardly has a (c, y) the
network says what it learned of the same y under other c.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..chain.noise import stream
from ..chain.rows import rows_of
from ..data.labels import NULL, Labels

MOST_ENUMERATED = 64  # conditions that are trained or certified one by one


@dataclass(frozen=True)
class ConditionSplit:
    """Hold which of the prior's conditions c are trained on, which are kept out of training, and which are measured."""

    trained: list[int]  # of a population in random order
    held_out: list[int]
    pooled: bool  # whether those trained on are a population
    measured: list[int]  # those trained on, or some of a population
    measured_held_out: list[int]

    @classmethod
    def of(cls, known: Sequence[int], held_out: Sequence[int], seed: int) -> "ConditionSplit":
        """Split known conditions: many, or some of which others are held out, are a population."""
        apart = set(held_out)
        trained = [c for c in known if c not in apart]
        if not apart and len(trained) <= MOST_ENUMERATED:
            return cls(trained, [], False, trained, [])
        trained, held_out = (
            [part[i] for i in torch.randperm(len(part), generator=stream(seed, f"order of conditions {name}")).tolist()]
            for part, name in ((trained, "trained on"), (list(held_out), "held out"))
        )
        measured = (sorted(part[:MOST_ENUMERATED]) for part in (trained, held_out))
        return cls(trained, held_out, True, *measured)


@dataclass
class Conditions:
    """Number every pair (c, y): G conditions of the prior times K labels y.

    Pair p stands for condition p // K and label p % K. With several controls a label is one class of each, and the last
    control's class runs fastest.

    Args:
        cond: the prior's conditions by keyword, G rows each.
        controls: the number of classes of each control.
        nullable: controls that may also be null, as long as some control is not.
        gammas: the γ that are learned, first the one that half of the draws have; none where there is a single γ.
        names: what messages call the classes of a control, and the G conditions under their keyword; numbers if absent.
        pooled: whether the G conditions are a population, whose samples a learner shares.
        weights: of the G conditions of a population, how often each is drawn; None for equally often.
        drawn: whether the G conditions are a sample of a population, so that errors count how they differ.
    """

    cond: dict[str, Tensor]
    controls: dict[str, int]
    nullable: Collection[str] = ()
    gammas: tuple[float, ...] = ()
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    pooled: bool = False
    weights: Tensor | None = None
    drawn: bool = False

    @classmethod
    def for_training(
        cls, cond: dict[str, Tensor], controls: dict[str, int], fixed: Collection[str] = (),
        gammas: tuple[float, ...] = (), names: dict[str, Sequence[str]] | None = None, pooled: bool = False,
        weights: Sequence[float] = (),
    ) -> "Conditions":  # fmt: skip
        """Let any controls be null but not all; where some are fixed, only these, so that the others are trained."""
        nullable = (fixed or controls) if len(controls) > 1 else ()
        return cls(cond, controls, nullable, gammas, names or {}, pooled, torch.tensor(weights) if weights else None)

    @cached_property
    def combinations(self) -> Tensor:
        """The class of every control, or NULL, for each of the K labels: (K, controls)."""
        ranges = [torch.arange(NULL if name in self.nullable else 0, size) for name, size in self.controls.items()]
        rows = torch.cartesian_prod(*ranges).view(-1, len(ranges))
        return rows[(rows != NULL).any(1)]

    @property
    def classes(self) -> int:
        """K."""
        return len(self.combinations)

    @property
    def groups(self) -> int:
        """G, the number of the prior's conditions (1 if it has none)."""
        return len(next(iter(self.cond.values()))) if self.cond else 1

    @property
    def pairs(self) -> int:
        """G · K."""
        return self.groups * self.classes

    @property
    def strata(self) -> int:
        """The number of tables of samples times K: the pairs, or of a population the labels alone."""
        return self.classes if self.pooled else self.pairs

    @cached_property
    def choice(self) -> Tensor:
        """The number of the choice of controls that are not null, for each of the K labels: (K,)."""
        choice: Tensor = (self.combinations != NULL).unique(dim=0, return_inverse=True)[1]
        return choice

    @cached_property
    def choices(self) -> list[Tensor]:
        """The pairs, of a population the labels, of each choice of controls that are not null."""
        repeats = self.strata // self.classes
        return [(self.choice.repeat(repeats) == i).nonzero().squeeze(1) for i in self.choice.unique()]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n pairs (n,): each choice of controls equally often, and each of its pairs, but for the remainder.

        A choice of one control has few pairs, and would be rare if all pairs were equally frequent. Of a population the
        labels are drawn so, and conditions by their weights, stratified over the list.
        """
        count, rest = divmod(n, len(self.choices))
        first = int(torch.randint(len(self.choices), (), generator=generator)) if rest else 0
        parts = []
        for i, pairs in enumerate(self.choices):
            share = count + ((i - first) % len(self.choices) < rest)
            rounds = -(-share // len(pairs))
            order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(rounds)])[:share]
            parts.append(pairs[order])
        pair = torch.cat(parts)
        if not self.pooled:
            return pair
        quantile = (torch.randperm(n, generator=generator) + torch.rand((), generator=generator).double()) / n
        return self.at(quantile) * self.classes + pair

    def at(self, quantile: Tensor) -> Tensor:
        """Return the conditions (n,) at quantiles (n,) of their weights."""
        if self.weights is None:
            return (quantile.double() * self.groups).long().clamp(max=self.groups - 1)
        share = self.weights.double().cumsum(0)
        return torch.searchsorted(share, quantile.double() * share[-1], right=True).clamp(max=self.groups - 1)

    def rows(self, members: int) -> int:
        """Return how many samples are `members` for each condition; of a population so many in all."""
        return members if self.pooled else members * self.groups

    def spread(self, n: int) -> Tensor:
        """Return the conditions (n,) of n samples: equally many of each in turn, of a population by their weights."""
        if self.weights is None:
            return torch.arange(n) * self.groups // n
        return self.at((torch.arange(n) + 0.5) / n)

    def sample(self, n: int, generator: torch.Generator) -> "Conditions":
        """Draw n different conditions of a population, or all if it has no more, to enumerate."""
        if self.weights is None:
            group = torch.randperm(self.groups, generator=generator)[:n]
        else:
            group = torch.multinomial(self.weights.double(), min(n, self.groups), generator=generator)
        group = group.sort().values
        names = {
            name: [values[i] for i in group.tolist()] if name in self.cond else values
            for name, values in self.names.items()
        }
        return replace(self, cond=self.cond_of(group), names=names, pooled=False, weights=None, drawn=True)

    def draw_gamma(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw γ (n,) under the name "gamma": half of them the first, the rest the others equally often, stratified.

        Return nothing, and draw nothing, where there is a single γ.
        """
        if not self.gammas:
            return {}
        quantile = (torch.randperm(n, generator=generator) + torch.rand((), generator=generator)) / n
        others = len(self.gammas) - 1
        other = 1 + ((2 * quantile - 1) * others).long().clamp(0, others - 1)
        return {"gamma": torch.tensor(self.gammas)[torch.where(quantile < 0.5, 0, other)]}

    @property
    def cells(self) -> int:
        """The number of (c, y, γ), of a population of (y, γ)."""
        return self.strata * max(1, len(self.gammas))

    def cell(self, pair: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Return the numbers of (c, y, γ), or (y, γ), of pairs (B,) with drawn γ (B,), pairs running fastest."""
        stratum = pair % self.strata if self.pooled else pair
        if gamma is None:
            return stratum
        return (gamma[:, None] == torch.tensor(self.gammas)).int().argmax(1) * self.strata + stratum

    def row_of(self, cell: Tensor, member: Tensor, members: int) -> Tensor:
        """Return the row, among samples of `spread`, of the sample `member` (n,) of the table of cells (n,)."""
        return cell % self.strata // self.classes * members + member

    def pair_of(self, cell: Tensor, row: Tensor, rows: int) -> Tensor:
        """Return the pairs (n,) of cells (n,) under the conditions of a sample each, `row` (n,) of so many rows."""
        return self.spread(rows)[row] * self.classes + cell % self.classes

    def all(self, repeats: int) -> Tensor:
        """List every pair `repeats` times in a row: (pairs · repeats,)."""
        return torch.arange(self.pairs).repeat_interleave(repeats)

    def cond_of(self, group: Tensor) -> dict[str, Tensor]:
        """Return the prior's conditions for groups (B,)."""
        return rows_of(self.cond, group)

    def of(self, pair: Tensor) -> tuple[Labels, dict[str, Tensor]]:
        """Return labels and conditions of pairs (B,)."""
        classes = self.combinations[pair % self.classes]
        return dict(zip(self.controls, classes.unbind(1), strict=True)), self.cond_of(pair // self.classes)

    def name_of(self, stratum: int) -> str:
        """Return what messages call a pair, such as "c = 3, ink = heavy", without the controls that are null.

        Of a population it is the name of a label.
        """
        group = "" if self.pooled else self.name_of_group(stratum // self.classes)
        return ", ".join(part for part in (group, self.name_of_label(stratum % self.classes)) if part)

    def name_of_group(self, group: int) -> str:
        """Return what messages call a condition of the prior, such as "c = 3"; nothing if it has none."""
        return self._named(dict.fromkeys(self.cond, group))

    def name_of_label(self, label: int) -> str:
        """Return what messages call a label, such as "ink = heavy", without the controls that are null."""
        return self._named(dict(zip(self.controls, self.combinations[label].tolist(), strict=True)))

    def _named(self, numbers: dict[str, int]) -> str:
        """List keys with the names of their numbers."""
        values = {key: self.names[key][n] if key in self.names else n for key, n in numbers.items() if n != NULL}
        return ", ".join(f"{key} = {value}" for key, value in values.items())

    def label_of(self, labels: Labels) -> Tensor:
        """Return the label 0 … K − 1 (B,) that has these classes, NULL where one is; no control may be nullable."""
        label, known = torch.zeros((), dtype=torch.long), torch.ones((), dtype=torch.bool)
        for name, size in self.controls.items():
            label, known = label * size + labels[name], known & (labels[name] != NULL)
        return torch.where(known, label, NULL)
