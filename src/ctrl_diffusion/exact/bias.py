"""Where each method's bias comes from: every baseline and a learner on one target of the testbed, in nats.

The target is the prior's chain tilted by p(y | x_0), w = γ = 1. What is a denoiser, guided or learned, is judged on
lattices, without samples, and the gap of its paths splits into

    log Z − J = floor + (plug-in − floor) + excess.

The floor is what the best Gaussian steps leave; the plug-in the gap of the exact E[x_0 | x_t, y] in the prior's step,
right only as N → ∞. Both fall like 1/N. The excess is what the method itself gets wrong, and stays: an approximation
of p(y | x_t), few labels, a learner that was stopped.

What chooses among samples has no density. Counts in n samples on a grid of m cells give its KL from the target, too
large by (m − 1)/(2 n) to first order (Miller 1955); that is taken off. A grid sees no more than the whole KL, and less.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.noise import stream
from ..control.policy import Policy
from ..guide.classifier_guidance import ClassifierGuidance
from ..guide.free_guidance import FreeGuidance
from ..guide.method import Cost, Method
from ..guide.noisy import NoisyClassifier, fit_noisy
from ..guide.particles import TDS, FeynmanKac
from ..guide.reconstruction import DPS, MPGD
from ..guide.selection import BestOf, Importance, Rejection
from ..learn.fit import fit
from ..learn.labelled import Labelled
from ..reward.fit import Recipe
from ..reward.scorer import Architecture
from ..system.progress import Phase, silent
from .lattice import Outcome
from .mixtures import LinearGaussian
from .races import LR, learn
from .task import Answers, Task, new_policy

FEW, MANY = 500, 20_000  # labelled examples
PARTICLES = (4, 16, 64)
SPACING = 1.2  # of the lattices: at 0.7 a hundred steps say the same and take several times as long
SIDE, REACH, RAREST = 0.4, 2.8, 5.0  # of the cells and of their grid; the least a cell expects of the samples
BATCH = 8192  # paths that go together
REFERENCE = 500_000  # samples of the target that say what a cell should hold
FLOOR, PLUG_IN, LEARNER = "best Gaussian steps", "exact classifier guidance", "CTRL (adjoint)"


@dataclass
class Size:
    """How much is done: particles, samples that are counted, updates on few and on many labels, epochs of p̂, the share
    of CTRL's training. More updates on few labels would learn them by heart."""

    particles: tuple[int, ...] = PARTICLES
    samples: int = 3000
    updates: tuple[int, int] = (400, 1600)
    epochs: int = 100
    effort: float = 0.5


QUICK = Size((4, 16), 500, (50, 50), 10, 0.05)


def programme(quick: bool = False) -> list[tuple[str, str, tuple[int, ...]]]:
    """Schedules, likelihoods and the steps of the chains, the fewest first; particles are counted on flow."""
    if quick:
        return [("flow", "logistic", (10, 20))]
    on_flow = [("flow", name, (25, 100)) for name in ("logistic", "linear-Gaussian", "component")]
    return [*on_flow, ("vp", "logistic", (25, 100))]


def pair_of(task: Task) -> int:
    """The one (c, y) that is asked for: the first y, under the condition of uneven components."""
    return task.conditions.classes


def examples(task: Task, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """n labelled examples: x_0 (n, D) of the prior, one of the y asked for (n,), c (n,).

    Pairs are drawn and kept with probability p(y | x_0), which of a density leaves those whose y is one of its values.
    """
    (likelihood,) = task.likelihoods().values()
    bound, found, left = getattr(likelihood, "bound", 0.0), [], n
    while left > 0:
        tried = 20 * left
        c, y = (torch.randint(k, (tried,), generator=generator) for k in (2, likelihood.classes))
        x = task.prior().sample(tried, generator, c)
        log_p = likelihood.log_prob(x).gather(1, y[:, None]).squeeze(1) - bound
        kept = torch.rand(tried, generator=generator).log() < log_p
        found.append((x[kept][:left], y[kept][:left], c[kept][:left]))
        left -= len(found[-1][0])
    return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


def noisy_classifier(task: Task, n: int, epochs: int, seed: int) -> NoisyClassifier:
    """p̂(y | x_t, c) fitted on n labels, a fifth of them held out; of a continuous y as measured, in units of levels."""
    (likelihood,) = task.likelihoods().values()
    generator, head = stream(seed, "labels"), "categorical"
    x, y, c = examples(task, n, generator)
    if isinstance(likelihood, LinearGaussian):
        # not the examples that have one of the values: how likely these are is part of p(y | x_t)
        x, head, first = task.prior().sample(n, generator, c), "gaussian", likelihood.values[0]
        measured = x @ likelihood.direction + likelihood.std * torch.randn(n, generator=generator)
        y = (measured - first) / (likelihood.values[1] - first)
    held, schedule = n // 5, task.prior().schedule
    return fit_noisy(
        x[held:], y[held:], likelihood.classes, schedule, task.times, (x[:held], y[:held], c[:held]),
        Architecture(head, conditions=2), Recipe(epochs), c[held:], seed,
    )  # fmt: skip


def free_policy(task: Task, n: int, updates: int, seed: int) -> Policy:
    """A control regressed on n labelled examples, for classifier-free guidance."""
    generator, policy = stream(seed, "labels"), new_policy(task, seed)
    (name,) = policy.controls
    x, y, c = examples(task, n, generator)
    losses = Labelled(x, {name: y}, {"c": c}, task.times, batch=512)(policy, task.reward(), task.conditions, generator)
    for _ in fit(policy, losses, updates, LR):
        pass
    return policy


@dataclass
class Entrant:
    """A method with what it is called with: the prior or, for `FreeGuidance`, a policy.

    Args:
        name: of the method.
        method: the method.
        denoiser: what it is called with.
        labels: examples it has learned from.
        particles: for each sample.
    """

    name: str
    method: Method
    denoiser: Denoiser
    labels: int | None = None
    particles: int | None = None


def guided(task: Task, size: Size, seed: int) -> list[Entrant]:
    """What guides every step and was not trained on the chain: with no labels, and with few or many."""
    (name,), prior = task.likelihoods(), task.prior()
    fitted = ClassifierGuidance({name: noisy_classifier(task, FEW, size.epochs, seed)})
    return [
        Entrant("classifier guidance", fitted, prior, FEW),
        Entrant("DPS", DPS(), prior),
        Entrant("MPGD", MPGD(), prior),
        *(
            Entrant("classifier-free guidance", FreeGuidance(), free_policy(task, n, updates, seed), n)
            for n, updates in zip((FEW, MANY), size.updates, strict=True)
        ),
    ]


def choosing(task: Task, particles: tuple[int, ...]) -> list[Entrant]:
    """What chooses among samples, each of them independent of the others."""
    (likelihood,) = task.likelihoods().values()
    prior, bound = task.prior(), getattr(likelihood, "bound", 0.0) + 1e-5  # single precision rounds up, too
    found = [Entrant("rejection", Rejection(bound=bound, batch=BATCH), prior)]
    for k in particles:
        own = {"particles": k, "shared": False, "batch": BATCH}
        methods = {
            "TDS": TDS(**own), "Feynman–Kac": FeynmanKac(**own), "importance": Importance(**own),
            "best of K": BestOf(n=k, batch=BATCH),
        }  # fmt: skip
        found += [Entrant(name, method, prior, particles=k) for name, method in methods.items()]
    return found


class Cells:
    """A square grid whose cells hold known shares of the target; those that hold little count as one.

    Args:
        x_0: (n, 2), samples of the target.
        least: share of a cell that counts by itself.
    """

    def __init__(self, x_0: Tensor, least: float) -> None:
        share = self.squares(x_0).bincount(minlength=round(2 * REACH / SIDE) ** 2) / len(x_0)
        alone = share >= least
        self.number = torch.where(alone, alone.cumsum(0) - 1, alone.sum())
        self.share = torch.zeros(int(alone.sum()) + 1).index_add_(0, self.number, share)
        self.known = len(x_0)

    @staticmethod
    def squares(x_0: Tensor) -> Tensor:
        """The square (n,) each of x_0 (n, 2) lies in; what lies beyond the grid is of its border."""
        place = ((x_0 + REACH) / SIDE).long().clamp(0, round(2 * REACH / SIDE) - 1)
        return place[:, 0] * round(2 * REACH / SIDE) + place[:, 1]

    def kl(self, x_0: Tensor) -> tuple[float, float]:
        """KL of samples x_0 (n, 2) from the target on the grid, and its standard error, in nats."""
        count = self.number[self.squares(x_0)].bincount(minlength=len(self.share))
        return counted_kl(count, self.share, self.known)


def counted_kl(count: Tensor, share: Tensor, known: float = float("inf")) -> tuple[float, float]:
    """KL in nats of what counts (m,) were drawn from, from shares (m,), and its standard error.

    The mean of Σ f log(f/q) is too large by (m − 1)/(2 n), half of a chi-square of the occupied cells over n (Miller
    1955), and by as much of the samples that q itself was counted in. The variance is that of log(f/q) over n and, what
    is left at f = q, a quarter of the chi-square's over n², (m − 1)/(2 n²); from counts the first comes out too large
    by twice the second.

    Args:
        count: of samples in each cell.
        share: q.
        known: samples behind q.
    """
    n, some = int(count.sum()), count > 0
    f, over = count[some].double() / n, int(some.sum()) - 1
    ratio = (f / share[some].double()).log()
    kl = float(f @ ratio)
    variance = max((float(f @ ratio.square()) - kl**2) / n - over / n**2, 0.0) + over / (2 * n**2)
    return kl - over / 2 * (1 / n + 1 / known), variance**0.5


def row_of(name: str, common: dict[str, Any], cost: Cost | None = None, **found: Any) -> dict[str, Any]:
    """A row by the names of bias.json, None for what is not known or does not apply."""
    blank = dict.fromkeys(("particles", "labels", "gap_nats"))
    order = ("network_evaluations", "gradient_evaluations", "classifier_evaluations", "classifier_gradients")
    spent = {figure: cost and getattr(cost, figure) for figure in order}
    return {"method": name, **common, **blank, **found, **spent}


def exactly(outcome: Outcome, gap: float) -> dict[str, Any]:
    """What a row says of an outcome on lattices."""
    return {"gap_nats": gap, "true_kl_nats": outcome.true_kl, "true_kl_stderr": 0.0}


def compared(
    schedule: str, likelihood: str, steps: tuple[int, ...], size: Size, seed: int = 0, phase: Phase = silent
) -> Iterator[dict[str, Any]]:
    """The rows of one likelihood, chain by chain: the floor, the plug-in, then every method."""
    # what is learned from labels knows times, not steps: those of the longest chain hold the others'
    by_labels = guided(Task(schedule, likelihood, steps=max(steps)), size, seed)
    learned, effort = None, size.effort
    for n in steps:
        task = Task(schedule, likelihood, steps=n)
        answers, pair, particles = Answers(task, SPACING), pair_of(task), size.particles if n == steps[0] else ()
        learned, effort = learn("adjoint", task, seed, effort, phase, learned), effort / 4  # goes on at more steps
        entrants = [*by_labels, Entrant(LEARNER, FreeGuidance(), learned)]  # a policy at w = 1 is what that samples
        best, plug_in = answers.best(pair), answers.plugged_in(pair)
        floor, plugged = answers.gap(best, pair), answers.gap(plug_in, pair)
        common = {
            "likelihood": likelihood, "schedule": schedule, "steps": n, "floor_nats": floor, "plug_in_nats": plugged
        }  # fmt: skip
        yield row_of(FLOOR, common, **exactly(best, floor))
        for entrant in entrants:
            cost = sampled(entrant, task, pair, 16, seed)[1]
            if isinstance(entrant.method, ClassifierGuidance):  # the exact one is asked as often
                yield row_of(PLUG_IN, common, cost, **exactly(plug_in, plugged))
            found = answers.outcome(entrant.method.steered(entrant.denoiser, task.reward()), pair)
            yield row_of(entrant.name, common, cost, labels=entrant.labels, **exactly(found, answers.gap(found, pair)))
        if schedule != "flow" or not particles:
            continue
        cells = Cells(target_samples(task, answers, pair, REFERENCE, seed), RAREST / size.samples)
        for entrant in choosing(task, particles):
            x_0, cost = sampled(entrant, task, pair, size.samples, seed)
            kl, error = cells.kl(x_0)
            yield row_of(entrant.name, common, cost, particles=entrant.particles, true_kl_nats=kl, true_kl_stderr=error)


def sampled(entrant: Entrant, task: Task, pair: int, n: int, seed: int) -> tuple[Tensor, Cost]:
    """n samples x_0 (n, D) of a method for one pair, and what one of them cost."""
    labels, cond = task.conditions.of(torch.full((n,), pair))
    found = entrant.method(entrant.denoiser, task.reward(), labels, cond, task.times, stream(seed, "samples"))
    return found.x_0, found.cost


def target_samples(task: Task, answers: Answers, pair: int, n: int, seed: int) -> Tensor:
    """n samples x_0 (n, D) of the chain's target."""
    chain, reward = answers.of(pair)
    ends = chain.sample_target(reward, n, stream(seed, "target"))
    cond = {name: given.expand(n) for name, given in chain.cond.items()}
    return chain.prior(ends, task.times[-1], **cond).float()


def biases(quick: bool = False, seed: int = 0, phase: Phase = silent) -> Iterator[dict[str, Any]]:
    """The whole programme, row by row."""
    for schedule, likelihood, steps in programme(quick):
        yield from compared(schedule, likelihood, steps, QUICK if quick else Size(), seed, phase)
