"""Collect what is known of a trained control."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from .certificate import Certificate
from .scores import Nulled, Score

# what metrics.json calls the figures of a certificate
CERTIFIED = {
    "objective_nats": "objective", "objective_stderr": "objective_stderr", "log_z_nats": "log_z",
    "log_z_stderr": "log_z_stderr", "log_z_policy_nats": "log_z_policy", "log_z_policy_stderr": "log_z_policy_stderr",
    "gap_nats": "gap", "gap_stderr": "stderr", "ess_fraction": "ess",
}  # fmt: skip


@dataclass
class Evaluation:
    """The prior, the target and the policy judged alike, and the certificate; n paths of the policy.

    Of several controls, `parts` has the same with labels for some of them only, by their names, and `nulled` (of such a
    part) what came of the others.
    """

    prior: Score
    target: Score
    ctrl: Score
    certificate: Certificate
    n: int
    nulled: dict[str, Nulled] = field(default_factory=dict)
    parts: dict[tuple[str, ...], "Evaluation"] = field(default_factory=dict)

    @property
    def null_shift(self) -> float:
        """The largest change of another control's accuracy when one control is nulled."""
        return max(
            abs(part.ctrl.each[name] - self.ctrl.each[name])
            for part in self.parts.values()
            if len(part.nulled) == 1
            for name in part.ctrl.each
        )

    def by_control(self) -> dict[str, Any]:
        """The figures of several controls by the names metrics.json uses."""
        out: dict[str, Any] = {
            "all_accuracy": self.ctrl.accuracy,
            "all_target": self.target.accuracy,
            "null_shift": self.null_shift,
        }
        for name in self.ctrl.each:
            alone, without = self.parts[(name,)], next(p for p in self.parts.values() if list(p.nulled) == [name])
            nulled = without.nulled[name]
            out[name] = {
                "accuracy": self.ctrl.each[name],
                "judge_accuracy": self.ctrl.each_by_judge.get(name),
                "target": self.target.each[name],
                "alone": {
                    "accuracy": alone.ctrl.accuracy,
                    "accuracy_stderr": alone.ctrl.accuracy_stderr,
                    "judge_accuracy": alone.ctrl.judge_accuracy,
                    "target": alone.target.accuracy,
                    "class_accuracy": alone.ctrl.class_accuracy,
                    "samples": alone.n,
                    "gap_nats": alone.certificate.gap,
                    "gap_stderr": alone.certificate.stderr,
                },
                "nulled": {
                    "shares": {kind: shares.tolist() for kind, shares in nulled.shares.items()},
                    "stderr": {kind: stderr.tolist() for kind, stderr in nulled.stderr.items()},
                    "stderrs_from_prior": nulled.away_from("prior"),
                    "stderrs_from_target": nulled.away_from("target"),
                },
            }
        return out

    def diversity_ratio(self, score: Score) -> float:
        """A score's diversity relative to the target's."""
        return score.diversity / max(self.target.diversity, 1e-12)

    def metrics(self) -> dict[str, dict]:
        """The figures by the names metrics.json uses."""
        target, ctrl, gap = self.target, self.ctrl, self.certificate

        def shared(score: Score) -> dict[str, float | None]:
            return {
                "accuracy": score.accuracy,
                "accuracy_stderr": score.accuracy_stderr,
                "judge_accuracy": score.judge_accuracy,
                "class_accuracy": score.class_accuracy,
                "diversity": score.diversity,
                "outside_support": score.outside,
            }

        return {
            **({"controls": self.by_control()} if self.parts else {}),
            "prior": shared(self.prior),
            "target": shared(target),
            "ctrl": {
                "samples": self.n,
                **shared(ctrl),
                "macro_f1": ctrl.macro_f1,
                "diversity_ratio": self.diversity_ratio(ctrl),
                "kl_nats": gap.kl,
                "confusion": ctrl.confusion.tolist(),
            },
            "certificate": {
                **{said: getattr(gap, name) for said, name in CERTIFIED.items()},
                "ess_prior_fraction": gap.ess_prior,
                # one entry per (c, y), y running fastest
                "pairs": {said: getattr(gap, f"{name}_pairs").tolist() for said, name in CERTIFIED.items()},
            },
        }


def leaves(share: float, usual: float, error: float) -> bool:
    """Whether a share outside is more than twice the usual one, and more by three standard errors."""
    return share > max(2 * usual, usual + 3 * error)


def warn_if_left(prior: Score, ctrl: Score) -> None:
    """Warn if the policy has moved to where nothing was labelled.

    Raises:
        RuntimeWarning: more than twice the prior's share lies outside, and more by three standard errors.
    """
    if prior.outside is None or ctrl.outside is None:
        return
    error = math.hypot(prior.outside_stderr, ctrl.outside_stderr)
    if leaves(ctrl.outside, prior.outside, error):
        warnings.warn(
            f"samples leave the region the classifier was fitted on ({ctrl.outside:.1%} lie outside, of the prior's "
            f"{prior.outside:.1%}); compare the independent judge.",
            RuntimeWarning,
            stacklevel=2,
        )
