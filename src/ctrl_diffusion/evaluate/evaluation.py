"""Collect the scores and the certificate of a trained control."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..system.files import finite_or_none
from .certificate import Certificate, Slope
from .scores import Nulled, Score
from .verdict import Gain


@dataclass
class Evaluation:
    """Hold the scores of the prior, the target and the policy, measured alike, and the certificate."""

    prior: Score
    target: Score
    ctrl: Score
    certificate: Certificate  # of the policy's paths
    n: int  # how many paths
    nulled: dict[str, Nulled] = field(default_factory=dict)  # of a part: the classes of a control that was null
    # of several controls, the evaluation of each choice of them, by their names
    parts: dict[tuple[str, ...], "Evaluation"] = field(default_factory=dict)
    gained: Gain | None = None  # J over that of the untrained control, if they were compared
    clipped: float | None = None  # the share of the prior's samples that its clipping of x̂ holds, if it clips
    slope: Slope | None = None  # along γ, of a control for several γ
    gammas: dict[float, "Evaluation"] = field(default_factory=dict)  # for each of several γ, this one among them
    held_out: "Evaluation | None" = None  # on conditions of the prior that no training saw

    @property
    def null_shifts(self) -> tuple[Tensor, Tensor]:
        """Changes of another control's accuracy when one control is nulled, and their standard errors, (n,) each."""
        shifts = [
            (
                part.ctrl.accuracy_of[name] - self.ctrl.accuracy_of[name],
                math.hypot(part.ctrl.stderr_of[name], self.ctrl.stderr_of[name]),
            )
            for part in self.parts.values()
            if len(part.nulled) == 1
            for name in part.ctrl.accuracy_of
        ]
        return torch.tensor(shifts, dtype=torch.float64).unbind(1)

    def diversity_ratio(self, score: Score) -> float:
        """Divide a score's diversity by the target's, over the pairs (c, y) whose target is known; NaN if none is."""
        target = self.target.diversities
        return float(score.diversities[~target.isnan()].mean()) / max(float(target.nanmean()), 1e-12)

    def metrics(self) -> dict[str, dict]:
        """Return the figures by the names metrics.json uses."""
        ctrl = {
            "samples": self.n,
            **self.ctrl.metrics(),
            "macro_f1": self.ctrl.macro_f1,
            "diversity_ratio": self.diversity_ratio(self.ctrl),
            "kl_nats": self.certificate.kl,
            "confusion": self.ctrl.confusion.tolist(),
        }
        figures = {
            **({"controls": self.metrics_by_control()} if self.parts else {}),
            **({"gammas": [at.metrics_at(gamma) for gamma, at in self.gammas.items()]} if self.gammas else {}),
            "prior": self.prior.metrics(),
            "target": self.target.metrics(),
            "ctrl": ctrl,
            "certificate": self.certificate.metrics(),
            **({} if self.held_out is None else {"held_out": self.held_out.metrics_held_out()}),
        }
        return finite_or_none(figures)

    def metrics_held_out(self) -> dict[str, dict]:
        """Return the figures on conditions that no training saw."""
        figures = self.metrics()
        return {name: figures[name] for name in ("prior", "target", "ctrl", "certificate")}

    def metrics_at(self, gamma: float) -> dict[str, Any]:
        """Return the figures of the certificate's curve along γ, of one γ."""
        certificate, slope = self.certificate, self.slope
        return {
            "gamma": gamma,
            "objective_nats": certificate.objective,
            "log_z_nats": certificate.log_z,
            "gap_nats": certificate.gap,
            "gap_stderr": certificate.stderr,
            "certified_pairs": int(certificate.certified.sum()),
            "ess_prior_fraction": certificate.ess_prior,
            "log_z_slope": slope.log_z,
            "log_z_slope_stderr": slope.log_z_stderr,
            "mean_log_p": slope.log_p,
            "mean_log_p_stderr": slope.log_p_stderr,
            "accuracy": self.ctrl.accuracy,
            "accuracy_stderr": self.ctrl.accuracy_stderr,
            "target_accuracy": self.target.accuracy,
            "class_accuracy": self.ctrl.class_accuracy,
            "diversity_ratio": self.diversity_ratio(self.ctrl),
            "kl_nats": certificate.kl,
            "samples": self.n,
        }

    def metrics_by_control(self) -> dict[str, Any]:
        """Return the figures of several controls: of all together, of each alone, and of each while it is null."""
        figures: dict[str, Any] = {"all_accuracy": self.ctrl.accuracy, "all_target": self.target.accuracy}
        shifts, errors = self.null_shifts
        largest = int(shifts.abs().argmax())
        figures["null_shift"], figures["null_shift_stderr"] = float(shifts[largest].abs()), float(errors[largest])
        figures["null_shift_by_chance"] = largest_by_chance(errors)
        for name, accuracy in self.ctrl.accuracy_of.items():
            alone = self.parts[(name,)]
            figures[name] = {
                "accuracy": accuracy,
                "judge_accuracy": self.ctrl.judge_accuracy_of.get(name),
                "target": self.target.accuracy_of[name],
                "alone": {
                    "accuracy": alone.ctrl.accuracy,
                    "accuracy_stderr": alone.ctrl.accuracy_stderr,
                    "judge_accuracy": alone.ctrl.judge_accuracy,
                    "target": alone.target.accuracy,
                    "class_accuracy": alone.ctrl.class_accuracy,
                    "samples": alone.n,
                    "gap_nats": alone.certificate.gap,
                    "gap_stderr": alone.certificate.stderr,
                    "certified_pairs": int(alone.certificate.certified.sum()),
                },
                "nulled": next(p.nulled[name] for p in self.parts.values() if list(p.nulled) == [name]).metrics(),
            }
        return figures


def generalises(evaluation: Evaluation) -> str | None:
    """Say in a line how the gap on conditions no training saw compares; None where none were held out.

    The conditions are drawn independently of those trained on, so the error of the difference has both.
    """
    if evaluation.held_out is None:
        return None
    unseen, seen = evaluation.held_out.certificate, evaluation.certificate
    values = [
        f" {each.gap:.2f} ± {each.stderr:.2f} nats" if each.gap is not None else ": not certified"
        for each in (unseen, seen)
    ]
    line = f"gap on c it never saw{values[0]}, on those it was trained on{values[1]}"
    if unseen.gap is None or seen.gap is None:
        return line
    difference, error = unseen.gap - seen.gap, math.hypot(unseen.stderr, seen.stderr)
    if min(len(each.breakdown.conditions) for each in (unseen, seen)) == 1:
        line += " (how a single c differs from others is not in its error)"
    if abs(difference) <= 2 * error:
        return f"{line}: within two standard errors"
    larger = "larger" if difference > 0 else "smaller"
    return f"{line}: {larger} by {abs(difference):.2f} ± {error:.2f}, more than two standard errors"


def largest_by_chance(errors: Tensor) -> float:
    """Return the mean of the largest absolute value of normal differences with these errors (n,) around 0.

    It is the integral of P(max > x) = 1 − Π erf(x / (√2 s_i)) over x.
    """
    x = torch.linspace(0, 8 * float(errors.max()), 2001, dtype=torch.float64)
    below = torch.erf(x[:, None] / (2**0.5 * errors.double().clamp(min=1e-300))).prod(1)
    return float(torch.trapezoid(1 - below, x))


def leaves_region(share: float, usual: float, stderr: float) -> bool:
    """Return whether a share outside is more than twice the usual one, and more by three standard errors."""
    return share > max(2 * usual, usual + 3 * stderr)


def warn_if_outside(prior: Score, ctrl: Score) -> None:
    """Warn if the policy's samples leave the region p̂ was fitted on."""
    if prior.outside_support is None or ctrl.outside_support is None:
        return
    stderr = math.hypot(prior.outside_stderr, ctrl.outside_stderr)
    if leaves_region(ctrl.outside_support, prior.outside_support, stderr):
        message = (
            f"samples leave the region the classifier was fitted on ({ctrl.outside_support:.1%} lie outside, of the "
            f"prior's {prior.outside_support:.1%}); compare the independent judge."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
