"""Say whether a control has learned: whether its J is above that of the untrained one, and if not, why."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..reward.reward import SHOWN
from ..system.files import some_of
from .clusters import cluster_error

LEAST = 0.01  # nats: less is rounding
MUCH_CLIPPED = 0.1  # of a sample's numbers


class Gain(NamedTuple):
    """Hold a difference of J in nats, and its standard error."""

    nats: float
    stderr: float

    @classmethod
    def from_paths(cls, log_w: Tensor, before: Tensor, pairs: int = 1, clusters: int = 1) -> "Gain":
        """Compare log w, or rewards, (n,) of two policies on the same noise: the spread they share cancels.

        With as many paths of each of some `pairs` in turn, the error is that within the pairs, or clustered by
        `clusters_of` their conditions.
        """
        difference = (log_w - before).view(pairs, -1)
        within = float((difference.var(1) / difference.shape[1]).sum().sqrt()) / pairs
        return cls(float(difference.mean()), cluster_error(difference, clusters, within))

    @property
    def is_clear(self) -> bool:
        """Whether J is higher by more than its standard error; False where it is no number."""
        return self.nats > max(self.stderr, LEAST)

    def __str__(self) -> str:
        return f"{self.nats:.2f} ± {self.stderr:.2f} nats".replace("-", "−")


class Climb(NamedTuple):
    """Hold what the last probes of a training gained, and over how many updates."""

    nats: float
    stderr: float
    updates: int
    full_rate: bool = False  # whether before the learning rate decayed to zero

    @property
    def gain(self) -> Gain:
        return Gain(self.nats, self.stderr)

    def __str__(self) -> str:
        when = "updates before its rate decayed" if self.full_rate else "updates"
        return f"J rose by {self.gain} over the last {self.updates} {when}"


def percent(share: float | None) -> str:
    """Return a share as text."""
    return "not known" if share is None else f"{share:.1%}"


def gap_line(certificate: dict[str, Any], digits: int = 2) -> str:
    """Say what a certificate, by the names of metrics.json, bounds, and for which pairs (c, y) nothing is certified."""
    gap, names = certificate["gap_nats"], certificate.get("uncertified")
    bound = "" if gap is None else f"at most {gap:.{digits}f} ± {certificate['gap_stderr']:.{digits}f} nats"
    if not names:
        return bound
    text = f"not certified for any of {len(names)} (c, y), which too few of the prior's samples have"
    if gap is not None:
        named = some_of(names, SHOWN, "; ")
        certified = f"over {certificate['certified_pairs']} of {certificate['of_pairs']} (c, y)"
        text = f"{bound} {certified}; nothing is certified for {named}"
    if apart := certificate["on_paths"]:
        value = f"{apart['gap_nats']:.{digits}f} ± {apart['gap_stderr']:.{digits}f} nats"
        text += f" ({value} for {apart['pairs']} of these by the policy's own paths, which hide the modes it misses)"
    return text


@dataclass
class Verdict:
    """Hold whether a control has learned, what J gained over the untrained control's, and what explains a failure."""

    learned: bool
    gained: Gain
    climbing: Climb | None  # None unless J was still rising when the training ended
    causes: list[str]  # of a control that has not learned, the likeliest first
    cut: bool  # whether the user made the training short

    @property
    def exit_code(self) -> int:
        """3 for a control that has not learned, although it had its time."""
        return 0 if self.learned or self.cut else 3

    def metrics(self) -> dict[str, Any]:
        """Return the figures by the names metrics.json uses."""
        climbing = self.climbing and {name: v for name, v in self.climbing._asdict().items() if v is not False}
        gained = {"gained_nats": self.gained.nats, "gained_stderr": self.gained.stderr}
        return {**gained, "climbing": climbing, "causes": self.causes, "cut": self.cut}

    @classmethod
    def from_metrics(cls, metrics: dict[str, Any]) -> "Verdict":
        """Read it from the contents of metrics.json; those of an earlier version count as learned."""
        if "verdict" not in metrics:
            return cls(True, Gain(float("nan"), float("nan")), None, [], False)
        values = metrics["verdict"]
        climbing = values["climbing"] and Climb(**values["climbing"])
        gained = Gain(values["gained_nats"], values["gained_stderr"])
        return cls(metrics["learned"], gained, climbing, values["causes"], values["cut"])

    def lines(self, metrics: dict[str, Any], run: str = "RUN") -> list[str]:
        """Say in a line that the control has not learned, and in another that J is still climbing."""
        lines = []
        if not self.learned:
            scores = [percent(metrics[name]["accuracy"]).replace("%", " %") for name in ("ctrl", "prior", "target")]
            got = "{} as asked, {} without control, {} a perfect learner's".format(*scores)
            gap = f"gap to the exact conditional {gap_line(metrics['certificate'], 1)}"
            lines.append(f"not learned: J gained {self.gained} over the untrained control; {got}; {gap}. {self.why}")
        if self.climbing:
            lines.append(f"still climbing: {self.climbing}; go on with: ctrl train --resume {run} --time 1h")
        return lines

    @property
    def why(self) -> str:
        """The likely causes in one sentence, or what to try."""
        if self.causes:
            return f"Likely: {'; '.join(self.causes)}."
        return "No measurement says why: try another learner, more time, or a chain of more steps."


def likely_causes(
    classifiers: dict[str, dict[str, Any]], accuracies: tuple[float, float], climbing: bool, cut: bool,
    clipped: float | None,
) -> list[str]:  # fmt: skip
    """List what measurements say against a control that has not learned: p̂, too little time, a prior that clips.

    Args:
        classifiers: the held-out report of each control's p̂.
        accuracies: of the prior and of the target.
        climbing, cut: whether J was still rising, and whether the user made the training short.
        clipped: the share of the numbers of the prior's samples that its clipping of x̂ holds; None if it clips none.
    """
    causes, (prior, target) = [], accuracies
    for name, report in classifiers.items():
        nll, chance = report["nll"], report["chance_nll"]
        if chance - nll < min(0.5, abs(chance) / 2):
            causes.append(f"p̂ of {name} knows little of it (held-out NLL {nll:.2f}, chance {chance:.2f})")
    if target - prior < 0.25 * (1 - prior):
        causes.append(f"with this p̂ even a perfect learner's samples are right in {target:.0%} only")
    if climbing or cut:
        causes.append(f"too little time ({'J was still climbing' if climbing else 'it was cut short'})")
    if clipped is not None and clipped > MUCH_CLIPPED:
        causes.append(f"the prior clips x̂, and {clipped:.0%} of its samples' numbers get no gradient")
    return causes
