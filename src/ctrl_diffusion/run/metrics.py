"""Hold the figures of a finished run under the names of metrics.json."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from platform import python_version
from typing import Any

from sklearn.metrics import r2_score

from .folder import StartRecord
from .measure import Measurements, ScaleSamples
from .run import Run

PACKAGES = ("ctrl-diffusion", "torch", "diffusers", "peft", "accelerate", "scikit-learn")
OPTIONAL = ("controls", "scale", "dependence", "strength", "steps")  # left out where they are None


@dataclass
class ScaleMetrics:
    """Say how samples follow the places requested on a scale, in levels."""

    samples: int
    r2: float
    mean_error_levels: float
    root_mean_square_error_levels: float

    @classmethod
    def from_samples(cls, samples: ScaleSamples) -> "ScaleMetrics":
        """Compare requested and measured places."""
        requested, measured = samples
        error = measured - requested
        r2 = r2_score(requested.numpy(), measured.numpy())
        return cls(len(requested), r2, float(error.mean()), float(error.square().mean().sqrt()))


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
class KeptControl:
    """Say which control was kept: the stage and update of its probe, and whether its weights are averages."""

    stage: str
    update: int
    averaged: bool


@dataclass
class TrainingMetrics:
    """Hold the control that was kept, and the last record of each stage."""

    kept: KeptControl
    stages: list[dict[str, Any]]

    @classmethod
    def from_records(cls, records: Sequence[dict[str, Any]]) -> "TrainingMetrics":
        """Read them off the log, whose last record is the kept control's probe."""
        *records, last = records
        stages = [record for record in records if "averaged" in record or "stopped" in record]
        return cls(KeptControl(last["stage"], last["update"], "averaged" in last), stages)


@dataclass
class RunMetrics:
    """Hold the contents of metrics.json, which docs/report.md explains.

    Args:
        accuracy_by: "ruler" or "judge", which measured y.
        controls, prior, target, ctrl, certificate: of the `Evaluation`; controls only of several.
        scale: of the controls on a scale, if there are any.
        dependence: of the labels of two controls, if images have both.
        training: the kept control and the end of each stage.
        sweep: over "strength" and "steps".
        classifier: the held-out report of p̂, of several controls by their names.
        labels: the number of labelled images of each control.
        seconds: of each part.
        versions: of the packages.
    """

    accuracy_by: str
    controls: dict[str, Any] | None
    prior: dict[str, Any]
    target: dict[str, Any]
    ctrl: dict[str, Any]
    certificate: dict[str, Any]
    scale: dict[str, ScaleMetrics] | None
    dependence: dict[str, Any] | None
    training: TrainingMetrics
    sweep: dict[str, list[SweepPoint]]
    classifier: dict[str, Any]
    labels: dict[str, int]
    seconds: dict[str, float]
    versions: dict[str, str]

    @classmethod
    def from_run(
        cls, run: Run, measurements: Measurements, records: Sequence[dict[str, Any]], start: StartRecord
    ) -> "RunMetrics":
        """Collect the figures of a run that was trained and measured.

        Args:
            run: the run.
            measurements: of it.
            records: of its log.
            start: of its training; its seconds are those of all parts by now.
        """
        evaluation = measurements.evaluation
        classifiers = {name: panel.metrics() for name, panel in run.panels.items()}
        seconds = {**start.seconds, "total": sum(start.seconds.values())}
        return cls(
            accuracy_by=run.accuracy_by,
            **{"controls": None, **evaluation.metrics()},
            scale={name: ScaleMetrics.from_samples(pair) for name, pair in measurements.scales.items()} or None,
            dependence=start.dependence or None,
            training=TrainingMetrics.from_records(records),
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
        return asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None or k not in OPTIONAL})
