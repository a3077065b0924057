"""Regress the denoiser on labelled data, with no classifier, as classifier-free guidance is trained.

The loss is ½‖(x̂(x_t, c, y) − x_0)/σ_t‖² at the times of the chain. Labels are dropped at random (Ho & Salimans 2022,
algorithm 1) so that one policy serves every choice of controls; each row keeps one, as the policy of no label at all is
the frozen prior, where there is nothing to learn.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..chain.rollout import Times
from ..chain.rows import rows_of
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..data.labels import NULL, Labels
from ..reward.reward import Reward
from ..system import ranks
from .step import Step, noised, regression


@dataclass
class Labelled:
    """Learn by regression on n labelled examples; datasets of different controls are concatenated."""

    x_0: Tensor  # (n, *); latents if the prior is a latent model
    labels: Labels  # control → (n,), NULL where a row has no such label
    cond: dict[str, Tensor]  # the prior's conditions, n rows each
    times: Times  # the chain's grid
    batch: int = 256  # samples an update
    dropout: float = 0.1  # how often a label is dropped from a row that has others
    micro: int | None = None  # samples that go through the network at once; None for all

    def __call__(self, policy: Policy, reward: Reward, conditions: Conditions, generator: Generator) -> Iterator[Step]:
        """Yield losses without end; reward and conditions are not used."""
        share = ranks.rank_rows(self.batch)
        while True:
            row = torch.randint(len(self.x_0), (self.batch,), generator=generator)
            labels, row = rows_of(self.drop_labels(rows_of(self.labels, row), generator), share), row[share]
            cond, x_0 = rows_of(self.cond, row), self.x_0[row].to(policy.device)
            states = noised(policy, x_0, self.times, self.batch, generator)
            yield from regression(policy, x_0, states, labels, cond, self.batch, self.micro)

    def drop_labels(self, labels: Labels, generator: Generator) -> Labels:
        """Set labels to null at random, but not all of a row."""
        present = torch.stack([y != NULL for y in labels.values()])  # (controls, B)
        kept = present & (torch.rand(present.shape, generator=generator) >= self.dropout)
        kept = torch.where(kept.any(0), kept, present)
        return {name: torch.where(keep, y, NULL) for (name, y), keep in zip(labels.items(), kept, strict=True)}
