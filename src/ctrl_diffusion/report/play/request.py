"""Say what a visitor asks a run for, within bounds, and the command that draws it again."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...chain.noise import Generators
from ...data.labels import NULL
from ...run.run import Run
from ..word import MOST_CHARACTERS, checked_word, letter_noise, letters_of

MOST_PICTURES, MOST_NUMBERS = 64, 2**23  # of one drawing: pictures, and the numbers of all of them
FIRST_PICTURES = 16
MOST_STRENGTH, MOST_SEED = 4.0, 2**32 - 1
TIMES_STEPS = 4  # more steps than trained, at most
MOST_LETTERS, MOST_PROMPTS = 500, 32  # of a prompt, and of prompts that a page has added to a run


def most_pictures(run: Run) -> int:
    """Return how many pictures one drawing may have: fewer of large ones."""
    return max(1, min(MOST_PICTURES, MOST_NUMBERS // math.prod(run.prior.image_shape)))


def most_steps(run: Run) -> int:
    """Return how many sampling steps may be asked for."""
    return TIMES_STEPS * run.config.steps


def number(name: str, value: Any, low: float, high: float, whole: bool = False) -> float:
    """Return a number a visitor gave; refuse (ValueError) what is none, not whole, or beyond low … high.

    It is rounded to the digits that a command shows.
    """
    kind = "a whole number" if whole else "a number"
    wrong = f"{name} must be {kind} in {low:g} … {high:g}, got {str(value)[:40]!r}."
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(wrong)
    if not low <= value <= high or (whole and value != int(value)):  # NaN is beyond all
        raise ValueError(wrong)
    return int(value) if whole else float(f"{value:g}")


@dataclass(frozen=True)
class Request:
    """Hold what is asked for: labels by control (one left out is null), c by name (None for each in turn)."""

    labels: Mapping[str, float]
    texts: Mapping[str, str]  # the labels, as `--set` takes them
    c: str | None
    n: int
    strength: float
    gamma: float | None  # None for the run's
    steps: int
    seed: int
    word: str = ""  # each of its letters is one of the n pictures, in place of c; blank for none

    @classmethod
    def checked(cls, run: Run, values: Mapping[str, Any]) -> "Request":
        """Check what a visitor gave for `labels`, `c`, `n`, `strength`, `gamma`, `steps`, `seed` and `word`.

        A label or c that is blank or None is left to the prior; a word stands for c and n. Raises ValueError, in one
        line, for any other value that a page would not send: its functions can be called by hand.
        """
        labels, texts = {}, {}
        for name, value in values["labels"].items():
            if value is None or value == "":
                continue
            if name not in run.policy.controls:
                raise ValueError(f"unknown control {str(name)[:40]!r}; this run has: {run.name}.")
            space = run.policy.controls[name].space
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError(f"{name} must be one value, got {str(value)[:40]!r}.")
            texts[name] = space.text_of(space.label_of(value, name))
            labels[name] = space.label_of(texts[name], name)
        gamma = values.get("gamma")
        word = checked_word(run, values.get("word"), min(MOST_CHARACTERS, most_pictures(run)))
        if word:
            values = {**values, "c": None, "n": len(letters_of(run, word))}
        return cls(
            labels=labels,
            texts=texts,
            c=condition(run, values.get("c")),
            n=number("how many", values["n"], 1, most_pictures(run), whole=True),
            strength=number("strength", values["strength"], 0, MOST_STRENGTH),
            gamma=None if gamma is None else number("γ", gamma, 0, math.inf),
            steps=number("steps", values["steps"], 1, most_steps(run), whole=True),
            seed=number("seed", values["seed"], 0, MOST_SEED, whole=True),
            word=word,
        )

    @classmethod
    def first(cls, run: Run) -> "Request":
        """Return what a page asks before anybody turned anything: the last label of each control."""
        values = {
            "labels": {name: control.space.values[-1] for name, control in run.policy.controls.items()},
            "c": None,
            "n": min(FIRST_PICTURES, most_pictures(run)),
            "strength": 1,
            "gamma": run.config.gamma if run.config.trained_gammas else None,
            "steps": run.config.steps,
            "seed": 0,
        }
        return cls.checked(run, values)

    @property
    def in_words(self) -> str:
        """The labels asked for, such as "ink 4, slant left"."""
        return ", ".join(f"{name} {text}" for name, text in self.texts.items()) or "nothing asked"

    def cond(self, run: Run) -> dict[str, Tensor]:
        """Return the prior's conditions of the n samples, as `ctrl sample` chooses them; a new prompt is encoded."""
        if run.prior.classes is None:
            return {}
        if self.word:
            return {"c": letters_of(run, self.word)}
        if self.c is not None:
            return {"c": torch.full((self.n,), run.prior.number_of(self.c))}
        classes = torch.tensor(run.classes)
        return {"c": classes[torch.arange(self.n) % len(classes)]}

    def rows(self, run: Run) -> dict[str, Tensor]:
        """Return the labels of the n samples, as `ctrl sample` gives them."""
        labels = {name: torch.full((self.n,), label) for name, label in self.labels.items()}
        return labels or {run.names[0]: torch.full((self.n,), NULL)}

    def noise(self) -> Generators:
        """Return the generators of the noise, as `ctrl sample` takes them: of a word one for each letter."""
        return letter_noise(self.seed, self.n) if self.word else torch.Generator().manual_seed(self.seed)

    def command(self, run: Run, folder: str) -> str:
        """Return the command that draws the same samples of the run in a folder."""
        parts = ["ctrl", "sample", folder]
        for name, text in self.texts.items():
            parts += ["--set", f"{name}={text}"]
        parts += [] if self.c is None else ["--class", self.c]
        parts += ["--word", self.word] if self.word else ["-n", str(self.n)]
        parts += ["--strength", f"{self.strength:g}"]
        parts += [] if self.gamma is None else ["--gamma", f"{self.gamma:g}"]
        parts += [] if self.steps == run.config.steps else ["--steps", str(self.steps)]
        return shlex.join([*parts, "--seed", str(self.seed), "--out", "samples"])


def condition(run: Run, c: Any) -> str | None:
    """Return the class or the prompt asked for, None for each in turn; refuse (ValueError) what the prior has not."""
    if c is None or c == "":
        return None
    if run.prior.classes is None:
        raise ValueError("this prior is unconditional: leave the condition out.")
    if not isinstance(c, str) or len(c) > MOST_LETTERS:
        raise ValueError(f"the condition must be a text of at most {MOST_LETTERS} letters, got {str(c)[:40]!r}.")
    if c in run.prior.names or run.prior.text is None:
        run.prior.number_of(c)  # refuses an unknown class
        return c
    first = len(run.config.prompts if isinstance(run.config.prompts, list) else run.known_classes)
    if run.prior.classes - first >= MOST_PROMPTS:
        raise ValueError(
            f"{MOST_PROMPTS} prompts were added to this page already. Choose one of those, or start it again."
        )
    return c
