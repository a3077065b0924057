"""Widen the grid of what turns a method up until the best on it lies inside.

The knob of every method but one is the strength w, which multiplies the reward. Rejection, importance and particles are
exact samplers of the tilt in the limit, of tries or of particles, so that at w they sample p(x | c) p̂(y | x)^w: turning
them up is tempering. More particles are no strength, they only bring the same tilt nearer. A guided chain moves x̂ by w
times its gradient, CTRL and classifier-free guidance by w times their difference from the prior; only at w = 1 is p̂^w
what they aim at. The best of n does not see w, since a maximum is the same under w r. Its knob is n: the best has the
prior's density times n F(r)^(n − 1), which rises with n.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Scores = Sequence[float | None]  # by each criterion, more is better; None where it was not measured


@dataclass(frozen=True)
class Knob:
    """Describe what turns a method up, and how far its grid may widen."""

    setting: str | None = None  # a setting of the method; None for w
    grid: tuple[float, ...] = ()  # where trials begin; empty for the comparison's strengths
    least: float = 1 / 64
    most: float = 64.0
    off: float = 0.0  # where the method is the prior: nothing lies below

    def best(self, tried: Mapping[float, Scores | None], criterion: int = 0) -> float | None:
        """Return the value whose score is the largest, of equals the nearest to 1; None if none has a score.

        `tried` maps values to their scores, None for a value that cannot be sampled.
        """
        scored = {}
        for value, scores in tried.items():
            score = scores[criterion] if scores else None
            if score is not None and not math.isnan(score):
                scored[value] = (score, -abs(math.log(value)) if value else -math.inf)
        return max(scored, key=scored.__getitem__) if scored else None

    def on_edge(self, tried: Mapping[float, Scores | None]) -> list[float]:
        """Return the value that is best by each criterion, in order, if it is the smallest or the largest tried."""
        count = max((len(scores) for scores in tried.values() if scores), default=0)
        bests = [self.best(tried, criterion) for criterion in range(count)]
        ends = (min(tried), max(tried)) if tried else ()
        return [value for value in bests if value is not None and value in ends and value != self.off]

    def wider(self, tried: Mapping[float, Scores | None]) -> float | None:
        """Return the next value to try, half of the smallest or twice the largest; None if every best lies inside.

        A best on the edge of the widest grid, from `least` to `most`, has no next value either: see `on_edge`.
        """
        for value in self.on_edge(tried):
            half = value // 2 if isinstance(value, int) else value / 2
            if value == max(tried) and 2 * value <= self.most:
                return 2 * value
            if value == min(tried) and half >= self.least:
                return half
        return None


STRENGTH = Knob()
