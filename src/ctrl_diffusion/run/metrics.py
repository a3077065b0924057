"""Hold the figures of a finished run under the names of metrics.json."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from platform import python_version
from typing import Any

import torch
from torch import Tensor

from ..evaluate.evaluation import Evaluation
from ..evaluate.verdict import Climb, Verdict, likely_causes
from ..system.files import finite_or_none
from .folder import StartRecord
from .measure import Measurements
from .run import Run

PACKAGES = ("ctrl-diffusion", "torch", "diffusers", "peft", "accelerate", "scikit-learn")
OPTIONAL = (
    "controls",
    "gammas",
    "scale",
    "dependence",
    "intervals",
    "strength",
    "steps",
    "conditions",
    "held_out",
)  # left out where they are None


@dataclass
class SweepPoint:
    """Hold the scores at one strength or one number of steps; the other is None."""

    strength: float | None
    steps: int | None
    accuracy: float
    accuracy_stderr: float
    class_accuracy: float | None
    diversity_ratio: float


@dataclass
class RunMetrics:
    """Hold the contents of metrics.json, which docs/reference/report.md explains."""

    learned: bool  # whether J is above that of the untrained control
    verdict: dict[str, Any]
    accuracy_by: str  # "ruler" or "judge", which measured y
    controls: dict[str, Any] | None  # only of several
    gammas: list[dict[str, Any]] | None  # the certificate along γ, of controls for several γ
    prior: dict[str, Any]
    target: dict[str, Any]
    ctrl: dict[str, Any]
    certificate: dict[str, Any]
    conditions: dict[str, int] | None  # how many c were trained on and held out; None of an unconditional prior
    held_out: dict[str, Any] | None  # prior, target, ctrl and certificate on conditions that no training saw
    scale: dict[str, dict[str, float]] | None
    dependence: dict[str, Any] | None  # of the labels of two controls, if images have both
    intervals: dict[str, dict[str, float]] | None  # where each control speaks, of controls that do not everywhere
    training: dict[str, Any]  # the kept control, and the last record of each stage
    sweep: dict[str, list[SweepPoint]]
    classifier: dict[str, Any]  # the held-out report of p̂, of several controls by their names
    labels: dict[str, int]
    seconds: dict[str, float]
    versions: dict[str, str]

    @classmethod
    def from_run(
        cls, run: Run, measurements: Measurements, records: Sequence[dict[str, Any]], start: StartRecord
    ) -> "RunMetrics":
        """Collect the figures of a run; the last record of its log is the kept control's probe."""
        evaluation, last = measurements.evaluation, records[-1]
        classifiers = {name: panel.metrics() for name, panel in run.panels.items()}
        verdict = verdict_of(evaluation, classifiers, records, start.cut)
        seconds = {**start.seconds, "total": sum(start.seconds.values())}
        return cls(
            learned=verdict.learned,
            verdict=verdict.metrics(),
            accuracy_by=run.accuracy_by,
            **{"controls": None, "gammas": None, "held_out": None, **evaluation.metrics()},
            conditions=run.split and {"trained": len(run.split.trained), "held_out": len(run.split.held_out)},
            scale={name: scale_metrics(*pair) for name, pair in measurements.scales.items()} or None,
            dependence=start.dependence or None,
            intervals=intervals_of(run) or None,
            training={
                "kept": {"stage": last["stage"], "update": last["update"], "averaged": "averaged" in last},
                "stages": [record for record in records[:-1] if {"averaged", "stopped", "slower"} & set(record)],
            },
            sweep={
                kind: [
                    SweepPoint(
                        value if kind == "strength" else None, value if kind == "steps" else None, score.accuracy,
                        score.accuracy_stderr, score.class_accuracy, evaluation.diversity_ratio(score),
                    )
                    for value, score in scores.items()
                ]
                for kind, scores in measurements.sweep.items()
            },
            classifier=classifiers if len(classifiers) > 1 else next(iter(classifiers.values())),
            labels=start.labels,
            seconds={name: round(value, 1) for name, value in seconds.items()},
            versions={"python": python_version(), **{name: version(name) for name in PACKAGES}},
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON values of metrics.json."""
        values = asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None or k not in OPTIONAL})
        return finite_or_none(values)


def intervals_of(run: Run) -> dict[str, dict[str, float]]:
    """Return the noise levels of each control that has an interval, and how many of the chain's steps lie inside."""
    sigmas = torch.tensor([float(run.policy.schedule(t)[1]) for t in run.times[:-1]])
    return {
        name: {
            "sigma_off": control.interval[0],
            "sigma_on": control.interval[1],
            "steps": int(control.speaks(sigmas).sum()),
            "of_steps": len(sigmas),
        }
        for name, control in run.policy.controls.items()
        if control.interval
    }


def verdict_of(
    evaluation: Evaluation, classifiers: dict[str, dict[str, Any]], records: Sequence[dict[str, Any]], cut: bool
) -> Verdict:
    """Judge a trained control by its evaluation and its log, whose last record is the kept control's probe.

    It has learned if J rose, and if more samples have y than without control, unless p̂ lets even a perfect learner's
    have no more: the surest misses alone may become less sure, which raises J.
    """
    climbing, accuracies = last_climb(records), (evaluation.prior.accuracy, evaluation.target.accuracy)
    error = math.hypot(evaluation.prior.accuracy_stderr, evaluation.ctrl.accuracy_stderr)
    right = evaluation.ctrl.accuracy - accuracies[0] > error or accuracies[1] - accuracies[0] <= error
    learned = evaluation.gained.is_clear and right
    causes = likely_causes(classifiers, accuracies, climbing is not None, cut, evaluation.clipped)
    return Verdict(learned, evaluation.gained, climbing, [] if learned else causes, cut)


def last_climb(records: Sequence[dict[str, Any]]) -> Climb | None:
    """Return what the last probes of a log gained, if that is clear and the last stage was ended by its limit."""
    *_, end = [{}, *(record for record in records[:-1] if "intervals" not in record)]
    if "rose" not in end:
        return None
    climb = Climb(end["rose"], end["rose_stderr"], end["rose_over"], "decay_from" in end)
    return climb if climb.gain.is_clear else None


def scale_metrics(requested: Tensor, measured: Tensor) -> dict[str, float]:
    """Say how samples follow the places requested on a scale, (n,) and (n,), in levels; NaN is not measured."""
    from sklearn.metrics import r2_score

    requested, measured = requested[known := measured.isfinite()], measured[known]
    error = measured - requested
    r2 = r2_score(requested.numpy(), measured.numpy()) if len(measured) > 1 else math.nan
    mean, rms = float(error.mean()), float(error.square().mean().sqrt())
    return {"samples": len(requested), "r2": r2, "mean_error_levels": mean, "root_mean_square_error_levels": rms}
