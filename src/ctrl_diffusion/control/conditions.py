"""Number the conditions (c, y) that a control is trained, certified and measured on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..chain.rows import rows_of
from ..data.labels import NULL, Labels


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
        drawn: whether the G conditions are a sample of a population, so that errors count how they differ.
    """

    cond: dict[str, Tensor]
    controls: dict[str, int]
    nullable: Collection[str] = ()
    gammas: tuple[float, ...] = ()
    names: dict[str, Sequence[str]] = field(default_factory=dict)
    drawn: bool = False

    @classmethod
    def for_training(
        cls, cond: dict[str, Tensor], controls: dict[str, int], fixed: Collection[str] = (),
        gammas: tuple[float, ...] = (), names: dict[str, Sequence[str]] | None = None,
    ) -> "Conditions":  # fmt: skip
        """Let any controls be null but not all; where some are fixed, only these, so that the others are trained."""
        return cls(cond, controls, (fixed or controls) if len(controls) > 1 else (), gammas, names or {})

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

    @cached_property
    def choice(self) -> Tensor:
        """The number of the choice of controls that are not null, for each of the K labels: (K,)."""
        return (self.combinations != NULL).unique(dim=0, return_inverse=True)[1]

    @cached_property
    def choices(self) -> list[Tensor]:
        """The pairs of each choice of controls that are not null."""
        return [(self.choice.repeat(self.groups) == i).nonzero().squeeze(1) for i in self.choice.unique()]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw n pairs (n,): each choice of controls equally often, and each of its pairs, but for the remainder.

        A choice of one control has few pairs, and would be rare if all pairs were equally frequent.
        """
        count, rest = divmod(n, len(self.choices))
        first = int(torch.randint(len(self.choices), (), generator=generator)) if rest else 0
        parts = []
        for i, pairs in enumerate(self.choices):
            share = count + ((i - first) % len(self.choices) < rest)
            rounds = -(-share // len(pairs))
            order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(rounds)])[:share]
            parts.append(pairs[order])
        return torch.cat(parts)

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
        """The number of (c, y, γ)."""
        return self.pairs * max(1, len(self.gammas))

    def cell(self, pair: Tensor, gamma: Tensor | None = None) -> Tensor:
        """Return the numbers of (c, y, γ) of pairs (B,) with drawn γ (B,), pairs running fastest."""
        if gamma is None:
            return pair
        return (gamma[:, None] == torch.tensor(self.gammas)).int().argmax(1) * self.pairs + pair

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

    def name_of(self, pair: int) -> str:
        """Return what messages call a pair, such as "c = 3, ink = heavy", without the controls that are null."""
        parts = self.name_of_group(pair // self.classes), self.name_of_label(pair % self.classes)
        return ", ".join(part for part in parts if part)

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
        """Return the label 0 … K − 1 (B,) that has these classes; only where no control is nullable."""
        label = torch.zeros((), dtype=torch.long)
        for name, size in self.controls.items():
            label = label * size + labels[name]
        return label
