"""Measure a trained run: strengths, step counts, pictures from one noise."""

from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import r2_score
from torch import Tensor

from ..chain.noise import stream
from ..data.labels import NULL
from ..evaluate.evaluation import Evaluation
from ..evaluate.scores import Score
from ..reward.classifiers import Panel
from .prepare import fits
from .run import Run

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)


def step_counts(run: Run) -> list[int]:
    """At which a finished control is looked at: half its own, its own and twice as many, if the prior has them."""
    steps = run.config.steps
    return [k for k in (steps // 2, steps, 2 * steps) if k > 0 and fits(run.prior, run.config, k)]


def classifier_metrics(panels: dict[str, Panel]) -> dict[str, Any]:
    """What is known of p̂ by the names metrics.json uses; of several controls by their names."""
    found = {name: one.metrics() for name, one in panels.items()}
    return found if len(found) > 1 else next(iter(found.values()))


def sweep_metrics(sweep: dict[str, dict[float, Score]], evaluation: Evaluation) -> dict[str, list[dict]]:
    """The sweep by the names metrics.json uses."""
    return {
        kind: [
            {
                kind: value,
                "accuracy": score.accuracy,
                "accuracy_stderr": score.accuracy_stderr,
                "class_accuracy": score.class_accuracy,
                "diversity_ratio": evaluation.diversity_ratio(score),
            }
            for value, score in scores.items()
        ]
        for kind, scores in sweep.items()
    }


def follows(asked: Tensor, came: Tensor) -> dict[str, float]:
    """How samples follow the places (n,) that were asked for, by the names metrics.json uses; in levels."""
    miss = came - asked
    return {
        "samples": len(asked),
        "r2": r2_score(asked.numpy(), came.numpy()),
        "mean_error_levels": float(miss.mean()),
        "root_mean_square_error_levels": float(miss.square().mean().sqrt()),
    }


@dataclass
class Shown:
    """The samples that the pictures of a run show. Ranks sample them together, whoever draws.

    Args:
        prior, ctrl: see `same_noise`.
        plane: see `plane`; None of one control.
    """

    prior: Tensor
    ctrl: Tensor
    plane: Tensor | None

    @classmethod
    def of(cls, run: Run) -> "Shown":
        prior, ctrl = (same_noise(run, strength, columns_of(run)) for strength in (0.0, 1.0))
        return cls(prior, ctrl, plane(run) if len(run.names) > 1 else None)


def columns_of(run: Run) -> int:
    """Of the grid of samples: the prior's classes, ten at most, or ten draws of an unconditional prior."""
    return 10 if run.config.classes is None else min(10, len(run.config.classes))


def same_noise(run: Run, strength: float, columns: int) -> Tensor:
    """Samples for every y and column, columns running fastest; a column's noise is the same for every y.

    Columns are the prior's classes in turn, or draws of an unconditional prior.
    """
    classes = run.config.classes
    cond = {} if classes is None else {"c": torch.tensor(classes)[torch.arange(columns) % len(classes)]}
    conditions, rows = run.conditions, []
    for label in conditions.combinations:
        y = {name: one.expand(columns) for name, one in zip(conditions.controls, label, strict=True)}
        rows.append(run.sample(y, strength=strength, generator=stream(run.config.seed, "grid"), **cond))
    return torch.cat(rows)


def plane(run: Run, across: int = 4) -> Tensor:
    """The first two controls against each other, each also left out: `across` samples for each pair of values, the same
    noise for all, of the middle one of the prior's classes if it has classes.

    Returns:
        (1 + classes of the first, 1 + of the second, across, C, H, W), where they are left out first.
    """
    (first, rows), (second, columns) = [(n, len(run.policy.controls[n].values)) for n in run.names[:2]]
    classes, samples = run.config.classes, []
    cond = {} if classes is None else {"c": torch.full((across,), classes[len(classes) // 2])}
    for i in range(NULL, rows):
        for j in range(NULL, columns):
            y = {first: torch.full((across,), i), second: torch.full((across,), j)}
            samples.append(run.sample(y, generator=stream(run.config.seed, "plane"), **cond))
    return torch.cat(samples).unflatten(0, (-1, columns + 1, across))
