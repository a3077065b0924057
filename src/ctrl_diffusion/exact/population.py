"""Race learners on a population of conditions: c is a point of the plane, and counts where no training saw it.

The ring of `task.py` moves with c ~ N(0, I) and is reweighted by it (`moving.py`). A learner trains on some c, drawn
once, as it would on the prompts of a text model. The certificate on the same c and on others says what of it carries
over: each is a mean over drawn c, with its error clustered by c (`evaluate/clusters.py`).
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..chain.noise import stream
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..evaluate.certificate import Certificate
from ..system.progress import Phase, silent
from .mixtures import ComponentLabel
from .moving import MovingMixture
from .races import certificate_on, learn
from .task import RADIUS, Answers, Task

COORDINATES = 2  # of c
TURN, MOVE, LEAN = math.pi / 3, 0.4, 0.4  # c moves the ring in another direction than it weighs it
TRAINED, UNSEEN, ON_LATTICES = 200, 400, 6  # conditions; lattices are slow
EFFORT = 0.5  # share of the updates of `races.py`
SPACING = 1.2  # of the lattices, whose sums are then integrals to 2e-6
SAMPLES, PATHS = 500, 16  # of the prior for each c, and of the policy for each (c, y)
SEQUENCES = ("weighted, then adjoint", "contrast, then adjoint")


@dataclass(frozen=True)
class Population(Task):
    """Name a task whose c are drawn from N(0, I), of which some are trained on."""

    trained: int = TRAINED

    def prior(self, dtype: torch.dtype = torch.float32) -> MovingMixture:
        """Make the ring that moves with c."""
        ring, turn = super().prior(dtype), (math.cos(TURN), math.sin(TURN))
        move, radial = torch.zeros(self.dim, COORDINATES, dtype=dtype), ring.means[:, :COORDINATES] / RADIUS
        move[:COORDINATES] = MOVE * torch.tensor([[turn[0], -turn[1]], [turn[1], turn[0]]], dtype=dtype)
        return MovingMixture(ring.means, self.spread, ring.schedule, move, LEAN * radial)

    def likelihoods(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Return p(y | x), or p(y | x, c), of each control: a moving component is known by c alone."""
        if self.likelihood == "component":
            return {"component": ComponentLabel(self.prior(dtype), conditional=True)}
        return super().likelihoods(dtype)

    def drawn(self, n: int, name: str, seed: int = 0) -> Conditions:
        """Draw n conditions that errors count as drawn, with every y; others under another name or seed."""
        sizes = {name: likelihood.classes for name, likelihood in self.likelihoods().items()}
        c = torch.randn(n, COORDINATES, generator=stream(seed, f"conditions {name}"))
        gammas = (self.gamma, *self.gammas) if self.gammas else ()
        return Conditions({"c": c}, sizes, tuple(sizes) if self.nullable else (), gammas, drawn=True)

    @property
    def conditions(self) -> Conditions:
        """The population that is trained on, which shares its samples."""
        return replace(self.drawn(self.trained, "trained on"), pooled=True, drawn=False)

    def radius_of(self, conditions: Conditions) -> float:
        return RADIUS + MOVE * float(conditions.cond["c"].norm(dim=1).max())

    @property
    def c_of_controls(self) -> dict[str, int]:
        return {"coordinates": COORDINATES}


class Reach(NamedTuple):
    """Hold the certificates on the c that were trained on, all of them, and on others."""

    trained: Certificate
    unseen: Certificate

    @property
    def difference(self) -> tuple[float, float]:
        """How much larger the gap is on unseen c, in nats, and its standard error: the two share no c and no noise."""
        return self.unseen.gap - self.trained.gap, math.hypot(self.unseen.stderr, self.trained.stderr)

    @classmethod
    def of(cls, task: Population, policy: Policy, seed: int = 0) -> "Reach":
        """Measure a policy, in as many paths on few trained c as on many unseen."""
        counts = SAMPLES, PATHS * max(1, UNSEEN // task.trained)
        trained, unseen = task.drawn(task.trained, "trained on"), task.drawn(UNSEEN, "unseen", seed)
        return cls(
            certificate_on(trained, task, policy, counts, stream(seed, "certificate, trained on")),
            certificate_on(unseen, task, policy, (SAMPLES, PATHS), stream(seed, "certificate, unseen")),
        )


def reach(
    task: Population, name: str, seed: int = 0, effort: float = EFFORT, phase: Phase = silent
) -> dict[str, float | str]:
    """Train entries of the race in turn on a population and measure how far what they learned carries.

    Return a row of bench/results/population.json. The floor, and the gap without samples, are of some unseen c.
    """
    begin = time.perf_counter()
    policy = learn(name, task, seed, effort, phase)
    seconds = time.perf_counter() - begin
    gaps = Reach.of(task, policy, seed)
    answers = Answers(task, SPACING, task.drawn(ON_LATTICES, "unseen", seed))
    pairs = answers.conditions.pairs
    exact = [answers.gap(answers.outcome(policy, pair), pair) for pair in range(pairs)]
    row: dict[str, float | str] = {
        "learner": name, "schedule": task.schedule, "likelihood": task.likelihood, "steps": task.steps,
        "conditions_trained": task.trained, "conditions_unseen": UNSEEN,
    }  # fmt: skip
    for kind, certificate in zip(gaps._fields, gaps, strict=True):
        row |= {
            f"gap_{kind}_nats": certificate.gap, f"gap_{kind}_stderr": certificate.stderr,
            f"certified_{kind}": float(certificate.certified.double().mean()),
        }  # fmt: skip
    difference, stderr = gaps.difference
    return row | {
        "difference_nats": difference, "difference_stderr": stderr, "conditions_on_lattices": ON_LATTICES,
        "gap_floor_nats": float(answers.floors.mean()), "gap_on_lattices_nats": sum(exact) / pairs,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def programme() -> list[tuple[Population, str]]:
    """List the tasks with what trains on them: two sequences, fewer and fewer c, another y."""
    weighted, contrast = SEQUENCES
    many = Population("flow", "logistic")
    fewer = [(replace(many, trained=n), weighted) for n in (20, 5)]
    return [(many, weighted), (many, contrast), *fewer, (Population("flow", "linear-Gaussian"), weighted)]
