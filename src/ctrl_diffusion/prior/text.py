"""Condition on text: prompts are encoded once, numbered and looked up; classifier-free guidance is part of the prior.

With guidance g the prior is what its users sample, in KL as well: f(∅) + g (f(c) − f(∅)) (Ho & Salimans 2022), one call
of twice the batch. A control acts in both halves; its shift, which they share, is not amplified.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rows = dict[str, Tensor]


@dataclass
class TextFamily:
    """Describe the text conditions of a model family."""

    # prompts, negative prompt → the network's inputs for each prompt (G rows each), and for the negative (1 row each)
    encode: Callable[[Sequence[str], str], tuple[Rows, Rows]]
    call: Callable[..., Tensor]  # (x_t, timestep (B,), **rows) → prediction
    guidance: float  # the pipeline's default
    distilled: bool = False  # the network takes the guidance as a number, `guidance` (B,), and needs no second half


class Prompted:
    """Call a network for numbered prompts, `c` (B,), with guidance g (1 for none) away from a negative prompt."""

    def __init__(self, family: TextFamily, guidance: float, negative: str) -> None:
        self.family, self.guidance, self.negative = family, guidance, negative
        self.rows: Rows = {}
        self.null: Rows = {}

    @torch.no_grad()
    def add(self, prompts: Sequence[str]) -> None:
        """Encode prompts and number them after the ones there are."""
        rows, self.null = self.family.encode(prompts, self.negative)
        before = self.rows
        self.rows = {n: torch.cat([before[n], row.to(before[n])]) if before else row for n, row in rows.items()}

    def __call__(self, x_t: Tensor, timestep: Tensor, c: Tensor) -> Tensor:
        for encoded in (self.rows, self.null):  # moved once to the network's device and precision
            encoded.update({name: row.to(x_t) for name, row in encoded.items()})
        rows = {name: row[c] for name, row in self.rows.items()}
        if self.family.distilled:
            rows["guidance"] = torch.full_like(timestep, self.guidance)
        if self.family.distilled or self.guidance == 1.0:
            return self.family.call(x_t, timestep, **rows)
        both = {name: torch.cat([self.null[name].expand_as(row), row]) for name, row in rows.items()}
        null, prompted = self.family.call(x_t.repeat(2, 1, 1, 1), timestep.repeat(2), **both).chunk(2)
        return null + self.guidance * (prompted - null)


def default_guidance(pipeline: Any) -> float:
    """Return the guidance a pipeline samples with by default."""
    return inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
