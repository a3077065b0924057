"""Draw the samples that the pictures of a run show."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..chain.noise import stream
from ..data.labels import NULL
from ..evaluate.certificate import worst_conditions
from ..evaluate.evaluation import Evaluation
from ..run.run import Run


class PictureSamples(NamedTuple):
    """Hold the samples that the pictures of a run show (see `same_noise` and `plane`); ranks draw them together."""

    prior: Tensor
    ctrl: Tensor
    plane: Tensor | None  # None with one control
    # of conditions that no training saw, by the name of c: a PNG, or samples (n, C, H, W), y in turn
    worst: Mapping[str, Path | Tensor] | None = None

    @classmethod
    def from_run(cls, run: Run, evaluation: Evaluation | None = None) -> "PictureSamples":
        """Draw them; those of the worst conditions by an evaluation, if it has any that no training saw."""
        prior, ctrl = (same_noise(run, strength, columns_of(run)) for strength in (0.0, 1.0))
        worst = worst_samples(run, evaluation.held_out) if evaluation and evaluation.held_out else None
        return cls(prior, ctrl, plane(run) if len(run.names) > 1 else None, worst)


def columns_of(run: Run) -> int:
    """Return the columns of the grid of samples: the prior's classes, ten at most, or ten draws without classes."""
    return 10 if run.classes is None else min(10, len(run.classes))


def same_noise(run: Run, strength: float, columns: int) -> Tensor:
    """Draw samples for every y and column, columns running fastest; a column has the same noise for every y.

    Columns are the prior's classes in turn, or draws of an unconditional prior.
    """
    classes = run.classes
    cond = {} if classes is None else {"c": torch.tensor(classes)[torch.arange(columns) % len(classes)]}
    conditions, rows = run.conditions, []
    for labels in conditions.combinations:
        y = {name: label.expand(columns) for name, label in zip(conditions.controls, labels, strict=True)}
        rows.append(run.sample(y, strength=strength, generator=stream(run.config.seed, "grid"), **cond))
    return torch.cat(rows)


def worst_samples(run: Run, evaluation: Evaluation, across: int = 8) -> dict[str, Tensor]:
    """Draw `across` samples for each y, in turn, of the held-out conditions with the largest gap, by their names."""
    conditions, samples = run.held_out_conditions, {}
    label = torch.arange(conditions.classes).repeat_interleave(across)
    for group in worst_conditions(evaluation.certificate):
        labels, cond = conditions.of(group * conditions.classes + label)
        generator = stream(run.config.seed, "worst conditions")
        samples[conditions.name_of_group(group)] = run.sample(labels, **cond, generator=generator)
    return samples


def plane(run: Run, across: int = 4) -> Tensor:
    """Draw `across` samples for each pair of values of the first two controls, each also left out (which comes first).

    All pairs have the same noise and, if the prior has classes, the middle one of those trained. Shape of the result:
    (1 + classes of the first, 1 + of the second, across, C, H, W).
    """
    (first, rows), (second, columns) = [(n, len(run.policy.controls[n].values)) for n in run.names[:2]]
    classes, samples = run.classes, []
    cond = {} if classes is None else {"c": torch.full((across,), classes[len(classes) // 2])}
    for i in range(NULL, rows):
        for j in range(NULL, columns):
            y = {first: torch.full((across,), i), second: torch.full((across,), j)}
            samples.append(run.sample(y, generator=stream(run.config.seed, "plane"), **cond))
    return torch.cat(samples).unflatten(0, (-1, columns + 1, across))
