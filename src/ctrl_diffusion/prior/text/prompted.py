"""Condition on text: prompts are encoded once, numbered and looked up; classifier-free guidance is part of the prior.

With guidance g the prior is what its users sample, in KL as well: f(∅) + g (f(c) − f(∅)) (Ho & Salimans 2022), one call
of twice the batch. A control acts in both halves; its shift, which they share, is not amplified.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parts import quiet, refusing
from .encoded import EncodedPrompts, Rows
from .encoders import TextEncoder, digest_of, fingerprint, hash_texts


@dataclass
class TextFamily:
    """Describe the text conditions of a model family."""

    # prompts, negative prompt → the network's inputs for each prompt (G rows each), and for the negative (1 row each);
    # without a negative prompt (None) the latter are of no account
    encode: Callable[[Sequence[str], str | None], tuple[Rows, Rows]]
    call: Callable[..., Tensor]  # (x_t, timestep (B,), **rows) → prediction
    guidance: float  # the pipeline's default
    distilled: bool = False  # the network takes the guidance as a number, `guidance` (B,), and needs no second half
    encoders: dict[str, TextEncoder] = field(default_factory=dict)  # what `encode` computes with, by name
    tokens: str = "encoder_hidden_states"  # the name of the rows (G, T, F) that have a vector for each token


class PromptStorage(NamedTuple):
    """Hold how much room encoded prompts take."""

    prompts: int
    bytes_each: int
    bytes: int  # of all, once each is encoded


class Prompted:
    """Call a network for numbered prompts, `c` (B,), with guidance g (1 for none) away from a negative prompt.

    Prompts that are added are encoded at once and stay in memory. Those that are kept in files come first; they are
    encoded when they are looked up, each in a batch of its own, so that its bytes do not depend on the others.
    """

    def __init__(self, family: TextFamily, guidance: float, negative: str) -> None:
        self.family, self.guidance, self.negative = family, guidance, negative
        self.rows: Rows = {}
        self.null: Rows = {}
        self.means: Tensor | None = None  # (G, F) float32, of the tokens of the prompts in memory
        self.store: EncodedPrompts | None = None
        self.bytes_each = 0  # of an encoded prompt
        self._latest: tuple[Any, Rows, Tensor | None] = None, {}, None

    @property
    def stored(self) -> int:
        """The number of prompts kept in files; those in memory are numbered after them."""
        return len(self.store) if self.store else 0

    @torch.no_grad()
    def add(self, prompts: Sequence[str]) -> Rows:
        """Encode prompts and number them after the ones there are; return the rows of all in memory."""
        if self.store:
            encoded = [self.encode_alone(prompt) for prompt in prompts]
            rows = {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}
        else:
            rows, self.null = self.family.encode(prompts, self.negative)
            self.bytes_each = sum(row[0].nbytes for row in rows.values())
            if self.family.tokens in rows:  # before the network's precision rounds them
                means = mean_tokens(rows[self.family.tokens])
                self.means = means if self.means is None else torch.cat([self.means, means])
        before = self.rows
        self.rows = {n: torch.cat([before[n], row.to(before[n])]) if before else row for n, row in rows.items()}
        return self.rows

    @torch.no_grad()
    def keep(self, prompts: Sequence[str], folder: Path, pipeline: str) -> Rows:
        """Take numbered prompts to keep in files under a folder; return the rows of the first, which is not kept yet.

        The files' own folder is named by a hash of the prompts and of all that their bytes depend on, `pipeline` (its
        class) included: runs that share these share it.
        """
        first, self.null = self.family.encode(prompts[:1], self.negative)
        self.bytes_each = sum(row[0].nbytes for row in first.values())
        shapes = [[name, str(row.dtype), list(row.shape[1:])] for name, row in first.items()]
        key = digest_of([pipeline, fingerprint(self.family.encoders), shapes, hash_texts(prompts)])[:32]
        self.store = EncodedPrompts(self.encode_alone, prompts, folder / f"prompts-{key}", first)
        return first

    def encode_alone(self, prompt: str) -> Rows:
        """Encode a prompt in a batch of its own, in the encoders' precision, whatever the network computes in."""
        device = next(next(iter(self.family.encoders.values())).module.parameters()).device.type
        with (
            refusing(f"its text encoders cannot encode the prompt {prompt[:40]!r}"), quiet(), torch.no_grad(),
            torch.autocast(device, enabled=False),
        ):  # fmt: skip
            return self.family.encode([prompt], None)[0]

    def look_up(self, c: Tensor, x_t: Tensor) -> Rows:
        """Return the rows of c from files and memory, on the device and in the precision of x_t.

        The latest are kept: the steps of a chain look up the same prompts.
        """
        numbers = c.tolist()
        key = numbers, x_t.device, x_t.dtype
        if self._latest[0] != key:
            different = sorted(set(numbers))
            rows = {name: row.to(x_t.device, x_t.dtype) for name, row in self.encoded(different).items()}
            index = {number: i for i, number in enumerate(different)}
            self._latest = key, rows, torch.tensor([index[number] for number in numbers], device=x_t.device)
        _, rows, places = self._latest
        return {name: row[places] for name, row in rows.items()}

    def encoded(self, numbers: list[int]) -> Rows:
        """Return the rows of different prompts in rising order, on the CPU, as they were encoded."""
        total = self.stored + len(next(iter(self.rows.values()), ()))
        if numbers and not 0 <= numbers[0] <= numbers[-1] < total:
            raise ValueError(f"c must lie in 0 … {total - 1}, got {numbers[0]} … {numbers[-1]}.")
        rows = self.store.rows([number for number in numbers if number < self.stored])
        if added := [number - self.stored for number in numbers if number >= self.stored]:
            rows = {name: torch.cat([row, self.rows[name][added].to(row)]) for name, row in rows.items()}
        return rows

    def embedding(self, c: Tensor) -> Tensor:
        """Return the mean of the encoded tokens of prompts c (n,): (n, F), float32, on the CPU."""
        if self.family.tokens not in (self.store.fields if self.store else self.rows):
            raise ValueError(f"its text is not encoded token by token: there is no {self.family.tokens}.")
        if not self.store:
            return self.means[c.cpu()]
        numbers, places = c.cpu().unique(return_inverse=True)
        parts = [mean_tokens(self.encoded(part.tolist())[self.family.tokens]) for part in numbers.split(16)]
        return torch.cat(parts)[places]

    def __call__(self, x_t: Tensor, timestep: Tensor, c: Tensor) -> Tensor:
        for encoded in (self.null,) if self.store else (self.rows, self.null):
            encoded.update({name: row.to(x_t) for name, row in encoded.items()})  # moved once to the network's device
        rows = self.look_up(c, x_t) if self.store else {name: row[c] for name, row in self.rows.items()}
        if self.family.distilled:
            rows["guidance"] = torch.full_like(timestep, self.guidance)
        if self.family.distilled or self.guidance == 1.0:
            return self.family.call(x_t, timestep, **rows)
        both = {name: torch.cat([self.null[name].expand_as(row), row]) for name, row in rows.items()}
        null, prompted = self.family.call(x_t.repeat(2, 1, 1, 1), timestep.repeat(2), **both).chunk(2)
        return null + self.guidance * (prompted - null)

    def without_prompt(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """Call the network for the negative prompt, without guidance."""
        rows = {name: row.to(x_t).expand(len(x_t), *row.shape[1:]) for name, row in self.null.items()}
        return self.family.call(x_t, timestep, **rows)


def mean_tokens(states: Tensor) -> Tensor:
    """Return the mean over tokens of states (n, T, F), on the CPU in float32, one prompt at a time: equal bits."""
    means = [row.float().mean(0) for row in states.cpu()]
    return torch.stack(means) if means else states.new_empty(0, states.shape[-1], dtype=torch.float32)


def default_guidance(pipeline: Any) -> float:
    """Return the guidance a pipeline samples with by default."""
    return inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
