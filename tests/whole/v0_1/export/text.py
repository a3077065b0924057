"""Text conditions: prompts are encoded once, numbered, and looked up; classifier-free guidance is part of the prior.

With guidance g the prior is what its users sample: the prediction f(∅) + g (f(c) − f(∅)) (Ho & Salimans 2022), one
call of twice the batch, in rollout, KL and sampling alike. A control acts in both halves: what both share passes
through unamplified.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rows = dict[str, Tensor]


@dataclass
class TextFamily:
    """What a family's file says of its text conditions.

    Args:
        encode: prompts, negative prompt → what the network is given for each prompt (G rows each), and for the negative
            one (1 row each).
        call: (x_t, timestep (B,), **rows) → prediction.
        guidance: the pipeline's own default.
        distilled: whether the network is given the guidance as a number, `guidance` (B,), and needs no second half.
    """

    encode: Callable[[Sequence[str], str], tuple[Rows, Rows]]
    call: Callable[..., Tensor]
    guidance: float
    distilled: bool = False


class Prompted:
    """A network's call for numbered prompts, `c` (B,).

    Args:
        family: of the network.
        guidance: g; 1 asks for the prompt alone.
        negative: the prompt of the other half.
    """

    def __init__(self, family: TextFamily, guidance: float, negative: str) -> None:
        self.family, self.guidance, self.negative = family, guidance, negative
        self.rows: Rows = {}
        self.null: Rows = {}

    @torch.no_grad()
    def add(self, prompts: Sequence[str]) -> None:
        """Encode prompts and number them after those that are known."""
        rows, self.null = self.family.encode(prompts, self.negative)
        self.rows = {
            name: torch.cat([self.rows[name], row.to(self.rows[name])]) if self.rows else row
            for name, row in rows.items()
        }

    def _bring(self, x_t: Tensor) -> None:
        """What was encoded comes once to where it is needed, in the precision it is needed in."""
        for known in (self.rows, self.null):
            known.update({name: row.to(x_t) for name, row in known.items()})

    def __call__(self, x_t: Tensor, timestep: Tensor, c: Tensor) -> Tensor:
        self._bring(x_t)
        rows = {name: row[c] for name, row in self.rows.items()}
        if self.family.distilled:
            rows["guidance"] = torch.full_like(timestep, self.guidance)
        if self.family.distilled or self.guidance == 1.0:
            return self.family.call(x_t, timestep, **rows)
        both = {name: torch.cat([self.null[name].expand_as(row), row]) for name, row in rows.items()}
        without, asked = self.family.call(x_t.repeat(2, 1, 1, 1), timestep.repeat(2), **both).chunk(2)
        return without + self.guidance * (asked - without)


def place_of(pipeline: Any) -> torch.device:
    """Where a pipeline's encoders are."""
    return next(pipeline.text_encoder.parameters()).device
