"""Compare where each method's bias comes from: every baseline and a learner on one target of the testbed, in nats.

The target is the prior's chain tilted by p(y | x_0), w = γ = 1. A denoiser, guided or learned, is measured on lattices,
without samples, and the gap of its paths splits into

    log Z − J = floor + (plug-in − floor) + excess.

The floor is what the best Gaussian steps leave; the plug-in is the gap of the exact E[x_0 | x_t, y] in the prior's
step, right only as N → ∞. Both fall like 1/N. The excess is the method's own error and stays: an approximation of
p(y | x_t), few labels, a learner that was stopped.

A method that selects among samples has no density. Counts in n samples on a grid of m cells give its KL from the
target, too large by (m − 1)/(2 n) to first order (Miller 1955), which is subtracted. On a grid the KL can only be
smaller than the whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

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
SPACING = 1.2  # of the lattices: at 0.7 a hundred steps say the same and take several times as long
SIDE, REACH, RAREST = 0.4, 2.8, 5.0  # of the cells and of their grid; the fewest samples a cell should expect
BATCH = 8192  # paths drawn at once
REFERENCE = 500_000  # samples of the target that give the shares of the cells
FLOOR, PLUG_IN, LEARNER = "best Gaussian steps", "exact classifier guidance", "CTRL (adjoint)"


@dataclass
class Size:
    """Set the amount of work; more updates on few labels would overfit them."""

    particles: tuple[int, ...] = (4, 16, 64)
    samples: int = 3000  # that are counted
    updates: tuple[int, int] = (400, 1600)  # on few and on many labels
    epochs: int = 100  # of p̂
    effort: float = 0.5  # share of CTRL's training


QUICK = Size((4, 16), 500, (50, 50), 10, 0.05)


def programme(quick: bool = False) -> list[tuple[str, str, tuple[int, ...]]]:
    """List schedules, likelihoods and the steps of the chains, the fewest first; particles are counted on flow."""
    if quick:
        return [("flow", "logistic", (10, 20))]
    on_flow = [("flow", name, (25, 100)) for name in ("logistic", "linear-Gaussian", "component")]
    return [*on_flow, ("vp", "logistic", (25, 100))]


def pair_of(task: Task) -> int:
    """Return the (c, y) that is sampled: the first y, under the condition of uneven components."""
    return task.conditions.classes


class Examples(NamedTuple):
    """Hold n labelled examples: x_0 (n, D) of the prior with y (n,) and c (n,)."""

    x: Tensor
    y: Tensor
    c: Tensor


def examples(task: Task, n: int, generator: torch.Generator) -> Examples:
    """Draw n labelled examples.

    Pairs are drawn and kept with probability p(y | x_0), which of a density leaves those whose y is one of its values.
    """
    (likelihood,) = task.likelihoods().values()
    bound, batches, left = getattr(likelihood, "bound", 0.0), [], n
    while left > 0:
        c, y = (torch.randint(k, (20 * left,), generator=generator) for k in (2, likelihood.classes))
        x = task.prior().sample(20 * left, generator, c)
        log_p = likelihood.log_prob(x).gather(1, y[:, None]).squeeze(1) - bound
        kept = torch.rand(len(x), generator=generator).log() < log_p
        batches.append((x[kept][:left], y[kept][:left], c[kept][:left]))
        left -= len(batches[-1][0])
    return Examples(*(torch.cat(rows) for rows in zip(*batches, strict=True)))


def noisy_classifier(task: Task, n: int, epochs: int, seed: int) -> NoisyClassifier:
    """Fit p̂(y | x_t, c) on n labels, a fifth of them held out; a continuous y as measured, in units of levels."""
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
    """Train a control by regression on n labelled examples, for classifier-free guidance."""
    generator, policy = stream(seed, "labels"), new_policy(task, seed)
    (name,) = policy.controls
    x, y, c = examples(task, n, generator)
    losses = Labelled(x, {name: y}, {"c": c}, task.times, batch=512)(policy, task.reward(), task.conditions, generator)
    for _ in fit(policy, losses, updates, LR):
        pass
    return policy


@dataclass
class Sampler:
    """Pair a method with the denoiser it is called with: the prior or, for `FreeGuidance`, a policy."""

    name: str
    method: Method
    denoiser: Denoiser
    labels: int | None = None  # examples it has learned from
    particles: int | None = None  # for each sample


def guided_samplers(task: Task, size: Size, seed: int) -> list[Sampler]:
    """Return the methods that guide every step and were not trained on the chain: with no, few and many labels."""
    (name,), prior = task.likelihoods(), task.prior()
    fitted = ClassifierGuidance({name: noisy_classifier(task, FEW, size.epochs, seed)})
    return [
        Sampler("classifier guidance", fitted, prior, FEW),
        Sampler("DPS", DPS(), prior),
        Sampler("MPGD", MPGD(), prior),
        *(
            Sampler("classifier-free guidance", FreeGuidance(), free_policy(task, n, updates, seed), n)
            for n, updates in zip((FEW, MANY), size.updates, strict=True)
        ),
    ]


def selecting_samplers(task: Task, particles: tuple[int, ...]) -> list[Sampler]:
    """Return the methods that select among samples, independently for each sample."""
    prior = task.prior()
    samplers = [Sampler("rejection", Rejection(batch=BATCH), prior)]
    for k in particles:
        options = {"particles": k, "shared": False, "batch": BATCH}
        methods = {
            "TDS": TDS(**options), "Feynman–Kac": FeynmanKac(**options), "importance": Importance(**options),
            "best of K": BestOf(n=k, batch=BATCH),
        }  # fmt: skip
        samplers += [Sampler(name, method, prior, particles=k) for name, method in methods.items()]
    return samplers


class Histogram:
    """Count samples on a square grid whose cells hold known shares of samples x_0 (n, 2) of the target.

    All cells with less than the share `least` count as one.
    """

    def __init__(self, x_0: Tensor, least: float) -> None:
        share = self.cells(x_0).bincount(minlength=round(2 * REACH / SIDE) ** 2) / len(x_0)
        alone = share >= least
        self.number = torch.where(alone, alone.cumsum(0) - 1, alone.sum())
        self.share = torch.zeros(int(alone.sum()) + 1).index_add_(0, self.number, share)
        self.samples = len(x_0)

    @staticmethod
    def cells(x_0: Tensor) -> Tensor:
        """Return the cell (n,) that each of x_0 (n, 2) lies in; beyond the grid the nearest one."""
        index = ((x_0 + REACH) / SIDE).long().clamp(0, round(2 * REACH / SIDE) - 1)
        return index[:, 0] * round(2 * REACH / SIDE) + index[:, 1]

    def kl(self, x_0: Tensor) -> tuple[float, float]:
        """Return the KL of samples x_0 (n, 2) from the target on the grid, and its standard error, in nats."""
        count = self.number[self.cells(x_0)].bincount(minlength=len(self.share))
        return counted_kl(count, self.share, self.samples)


def counted_kl(count: Tensor, share: Tensor, samples: float = float("inf")) -> tuple[float, float]:
    """Return the KL in nats from the `share` q (m,) of what cell counts (m,) were drawn from, and its standard error.

    The mean of Σ f log(f/q) is too large by (m − 1)/(2 n), half of a chi-square of the occupied cells over n (Miller
    1955), and by as much for the `samples` that q itself was counted in. The variance is that of log(f/q) over n plus,
    which is left at f = q, a quarter of the chi-square's over n², (m − 1)/(2 n²); from counts the first comes out too
    large by twice the second.
    """
    n, occupied = int(count.sum()), count > 0
    f, over = count[occupied].double() / n, int(occupied.sum()) - 1
    ratio = (f / share[occupied].double()).log()
    kl = float(f @ ratio)
    variance = max((float(f @ ratio.square()) - kl**2) / n - over / n**2, 0.0) + over / (2 * n**2)
    return kl - over / 2 * (1 / n + 1 / samples), variance**0.5


def row_of(name: str, common: dict[str, Any], cost: Cost | None = None, **values: Any) -> dict[str, Any]:
    """Return a row by the names of bias.json, None for what is unknown or does not apply."""
    blank = dict.fromkeys(("particles", "labels", "gap_nats"))
    figures = ("network_evaluations", "gradient_evaluations", "classifier_evaluations", "classifier_gradients")
    costs = {figure: cost and getattr(cost, figure) for figure in figures}
    return {"method": name, **common, **blank, **values, **costs}


def exact_values(outcome: Outcome, gap: float) -> dict[str, Any]:
    """Return a row's values of an outcome on lattices."""
    return {"gap_nats": gap, "true_kl_nats": outcome.true_kl, "true_kl_stderr": 0.0}


def compare(
    schedule: str, likelihood: str, steps: tuple[int, ...], size: Size, seed: int = 0, phase: Phase = silent
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one likelihood, chain by chain: the floor, the plug-in, then every method."""
    # what is learned from labels depends on times, not steps: those of the longest chain include the others'
    by_labels = guided_samplers(Task(schedule, likelihood, steps=max(steps)), size, seed)
    policy, effort = None, size.effort
    for n in steps:
        task = Task(schedule, likelihood, steps=n)
        answers, pair, particles = Answers(task, SPACING), pair_of(task), size.particles if n == steps[0] else ()
        policy, effort = learn("adjoint", task, seed, effort, phase, policy), effort / 4  # continues at more steps
        best, plug_in = answers.best(pair), answers.plugged_in(pair)
        floor, plugged = answers.gap(best, pair), answers.gap(plug_in, pair)
        common = {
            "likelihood": likelihood, "schedule": schedule, "steps": n, "floor_nats": floor, "plug_in_nats": plugged
        }  # fmt: skip
        yield row_of(FLOOR, common, **exact_values(best, floor))
        for sampler in [*by_labels, Sampler(LEARNER, FreeGuidance(), policy)]:  # at w = 1 this samples the policy
            cost = sampled(sampler, task, pair, 16, seed)[1]
            if isinstance(sampler.method, ClassifierGuidance):  # the exact one costs the same
                yield row_of(PLUG_IN, common, cost, **exact_values(plug_in, plugged))
            outcome = answers.outcome(sampler.method.steered(sampler.denoiser, task.reward()), pair)
            values = exact_values(outcome, answers.gap(outcome, pair))
            yield row_of(sampler.name, common, cost, labels=sampler.labels, **values)
        if schedule != "flow" or not particles:
            continue
        histogram = Histogram(target_samples(task, answers, pair, REFERENCE, seed), RAREST / size.samples)
        for sampler in selecting_samplers(task, particles):
            x_0, cost = sampled(sampler, task, pair, size.samples, seed)
            kl, error = histogram.kl(x_0)
            yield row_of(sampler.name, common, cost, particles=sampler.particles, true_kl_nats=kl, true_kl_stderr=error)


def sampled(sampler: Sampler, task: Task, pair: int, n: int, seed: int) -> tuple[Tensor, Cost]:
    """Draw n samples x_0 (n, D) of a method for one pair; return them and the cost of one."""
    labels, cond = task.conditions.of(torch.full((n,), pair))
    samples = sampler.method(sampler.denoiser, task.reward(), labels, cond, task.times, stream(seed, "samples"))
    return samples.x_0, samples.cost


def target_samples(task: Task, answers: Answers, pair: int, n: int, seed: int) -> Tensor:
    """Draw n samples x_0 (n, D) of the chain's target."""
    chain, reward = answers.of(pair)
    ends = chain.sample_target(reward, n, stream(seed, "target"))
    cond = {name: values.expand(n) for name, values in chain.cond.items()}
    return chain.prior(ends, task.times[-1], **cond).float()


def biases(quick: bool = False, seed: int = 0, phase: Phase = silent) -> Iterator[dict[str, Any]]:
    """Run the whole programme, row by row."""
    for schedule, likelihood, steps in programme(quick):
        yield from compare(schedule, likelihood, steps, QUICK if quick else Size(), seed, phase)
