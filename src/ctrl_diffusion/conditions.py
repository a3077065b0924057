"""The conditions (c, y) a control is trained, certified and judged on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .control import Labels


@dataclass
class Conditions:
    """Every pair (c, y): G conditions of the prior times K classes of the control.

    Pair p stands for condition p // K and class p % K. With several controls y is one class of each, K the product of
    their sizes, and the last control's class runs fastest.

    Args:
        cond: the prior's conditions by keyword, G rows each.
        controls: the number of classes of each control.
    """

    cond: dict[str, Tensor]
    controls: dict[str, int]

    @property
    def classes(self) -> int:
        """K."""
        return math.prod(self.controls.values())

    @property
    def groups(self) -> int:
        """G, the number of the prior's conditions (1 if it has none)."""
        return len(next(iter(self.cond.values()))) if self.cond else 1

    @property
    def pairs(self) -> int:
        """G · K."""
        return self.groups * self.classes

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n pairs (n,), each as often as the others but for the remainder."""
        rounds = -(-n // self.pairs)
        return torch.cat([torch.randperm(self.pairs, generator=generator) for _ in range(rounds)])[:n]

    def group_of(self, pair: Tensor) -> Tensor:
        """Row of the condition for pairs (B,)."""
        return pair // self.classes

    def all(self, repeats: int) -> Tensor:
        """Every pair `repeats` times in a row: (pairs · repeats,)."""
        return torch.arange(self.pairs).repeat_interleave(repeats)

    def cond_of(self, group: Tensor) -> dict[str, Tensor]:
        """The prior's conditions for groups (B,)."""
        return {name: rows[group] for name, rows in self.cond.items()}

    def of(self, pair: Tensor) -> tuple[Labels, dict[str, Tensor]]:
        """Labels and conditions of pairs (B,)."""
        labels, step = {}, self.classes
        for name, size in self.controls.items():
            step //= size
            labels[name] = pair // step % size
        return labels, self.cond_of(self.group_of(pair))
