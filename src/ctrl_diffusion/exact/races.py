"""Race learners on priors whose everything is known: what `ctrl exact` runs.

The prior is a ring of eight Gaussians in the first two dimensions, under two conditions c: all components alike, or
those to the right more often. A learner gets what it would get of any prior: a denoiser, a reward, conditions. Where
D ≤ 2 it is measured on lattices (`lattice.py`), without samples: its KL from the target, and the floor below which no
learner can get. The certificate beside it is the one a run reports, from samples.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.noise import stream
from ..chain.paths import PriorPaths, paths, paths_with_states
from ..chain.rollout import rollout
from ..control.conditions import Conditions
from ..control.policy import Policy
from ..evaluate.certificate import Certificate, certify
from ..learn.fit import fit
from ..learn.step import Learner, PriorSampler
from ..learn.table import LEARNERS
from ..reward.reward import prior_table
from ..system.progress import Phase, silent
from .task import GROWING, SCHEDULES, Answers, Task, new_policy

LR = {"embedding": 5e-3, "adapter": 3e-3}
# for each entry of the race the learners that train in turn, with their settings
STAGES = {
    "contrast": {"contrast": {"updates": 1500, "batch": 256, "cache": 10_000}},
    "weighted": {"weighted": {"updates": 1500, "batch": 512, "cache": 10_000}},
    "adjoint": {"adjoint": {"updates": 800, "batch": 256}},
    "backprop": {
        "weighted": {"updates": 300, "batch": 512, "cache": 10_000}, "backprop": {"updates": 250, "batch": 128}
    },
    "ppo": {"ppo": {"updates": 1600, "batch": 512}},
}  # fmt: skip
ENTRIES = tuple(STAGES)
THEN = ", then "  # between entries that train one policy in turn


def prior_sampler(task: Task, generator: torch.Generator) -> PriorSampler:
    """Return what draws a task's prior for the learners that cache samples of it."""

    def prior_samples(members: int, states: int = 0) -> Tensor | PriorPaths:
        rows = task.conditions.rows(members)
        cond = task.conditions.cond_of(task.conditions.spread(rows))
        if not states:
            return paths(task.prior(), rows, task.times, generator, cond, batch=members).x_0
        steps = torch.arange(task.steps).expand(rows, -1)
        return paths_with_states(task.prior(), steps, task.times, generator, cond)

    return prior_samples


def stages(name: str, task: Task, effort: float, generator: torch.Generator) -> Iterator[tuple[Learner, int]]:
    """Yield the learners that train an entry of the race, or several in turn, with their numbers of updates."""
    for learner, values in [stage for part in name.split(THEN) for stage in STAGES[part].items()]:
        settings = LEARNERS[learner].Settings(**values)
        updates = max(1, round(effort * settings.updates))
        yield LEARNERS[learner].from_settings(settings, task.times, prior_sampler(task, generator)), updates


def learn(
    name: str, task: Task, seed: int = 0, effort: float = 1.0, phase: Phase = silent, policy: Policy | None = None
) -> Policy:
    """Train a policy, in place or a new one, as an entry of the race, by a share `effort` of its updates."""
    policy, generator = policy or new_policy(task, seed), stream(seed, "learn")
    for learner, updates in stages(name, task, effort, generator):
        advance = phase(f"{name}, {task.schedule}, {task.likelihood}, γ = {task.gamma:g}", updates)
        steps = learner(policy, task.reward(), task.conditions, generator)
        for _ in fit(policy, steps, updates, LR):
            advance(1)
    return policy


def certificate_of(task: Task, policy: Policy, n: int = 4000, seed: int = 0) -> Certificate:
    """Compute the certificate that a run reports, from at least n paths, and n samples of the prior per condition."""
    paths_each = -(-n // task.conditions.pairs)
    return certificate_on(task.conditions, task, policy, (n, paths_each), stream(seed, "certificate"), batch=n)


@torch.no_grad()
def certificate_on(
    conditions: Conditions, task: Task, policy: Policy, counts: tuple[int, int], generator: torch.Generator,
    batch: int = 4000,
) -> Certificate:  # fmt: skip
    """Compute it on any conditions c, from so many samples of the prior for each c, and paths for each (c, y)."""
    reward, times, (samples, paths_each) = task.reward(), task.times, counts
    cond = conditions.cond_of(torch.arange(conditions.groups).repeat_interleave(samples))
    x_prior = paths(policy.prior, conditions.groups * samples, times, generator, cond, batch=batch).x_0
    labels, cond = conditions.of(conditions.all(paths_each))
    total = len(cond["c"])
    gamma = task.gamma if task.gammas else None
    x_0, kl, log_ratio = paths(policy, total, times, generator, cond, labels, compare=True, batch=batch, gamma=gamma)
    table = prior_table(reward, conditions, x_prior)
    return certify(conditions, table, reward(x_0, labels, cond), kl, log_ratio, task.gamma)


@torch.no_grad()
def end_states(task: Task, policy: Denoiser, pair: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw n last states (n, D) of a policy's chain for one pair."""
    labels, cond = task.conditions.of(torch.full((n,), pair))
    control = {"labels": labels} if isinstance(policy, Policy) else {}
    x_1 = torch.randn(n, task.dim, generator=generator)
    return rollout(policy, x_1, task.times, generator=generator, cond=cond, **control).x[-1]


@dataclass
class Picture:
    """Show samples over the density they should have: the last states of the last pair (c, y)."""

    learner: str
    task: Task
    ends: Tensor  # (n, 2)
    axis: Tensor  # (M,), of both coordinates
    density: Tensor  # (M, M), of the chain's target


def race(
    task: Task, name: str, answers: Answers | None, seed: int = 0, effort: float = 1.0, phase: Phase = silent
) -> tuple[dict[str, Any], Picture | None]:
    """Train an entry on a task and measure it, exactly where the task has answers (D ≤ 2).

    Return a row by the names of exact.json, None for what is unknown where D > 2; and the picture of the last pair's
    last states, which the energy test is of, too.
    """
    begin = time.perf_counter()
    policy = learn(name, task, seed, effort, phase)
    seconds = time.perf_counter() - begin
    gap = certificate_of(task, policy, seed=seed)
    row = {
        "learner": name, "warmed_by": "weighted" if name == "backprop" else None, "schedule": task.schedule,
        "likelihood": task.likelihood, "dim": task.dim, "steps": task.steps, "gamma": task.gamma,
        "spread": task.spread, "objective_nats": gap.objective, "log_z_nats": gap.log_z, "gap_nats": gap.gap,
        "gap_stderr": gap.stderr, "gap_floor_nats": None, "true_kl_nats": None, "energy_p_value": None,
        "seconds": round(seconds, 1),
    }  # fmt: skip
    if answers is None:
        return row, None
    pairs, generator = task.conditions.pairs, stream(seed, "samples")
    row["gap_floor_nats"] = float(answers.floors.mean())
    row["true_kl_nats"] = sum(answers.outcome(policy, pair).true_kl for pair in range(pairs)) / pairs
    chain, reward = answers.of(pairs - 1)
    ends = end_states(task, policy, pairs - 1, 1000, generator)
    row["energy_p_value"] = energy_test(ends, chain.sample_target(reward, 1000, generator), 200, generator)[1]
    lattice = chain.lattices[-1]
    density = chain.log_target(reward).exp().view(len(lattice.axis), -1) / lattice.spacing**2
    return row, Picture(name, task, ends, lattice.axis, density)


def energy_test(
    x: Tensor, y: Tensor, permutations: int = 200, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Test whether two samples (n, *) and (m, *) come from one distribution (Székely & Rizzo 2004).

    Return the energy distance 2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖ (V-statistic, so never negative), and the p-value: the
    share of random relabellings, with the actual one, that make it at least as large.
    """
    both, n = torch.cat([x, y]).flatten(1).double(), len(x)
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    labels = torch.stack(
        [torch.arange(len(both)), *(torch.randperm(len(both), generator=generator) for _ in range(permutations))]
    )
    # weights 1/n on one sample and −1/m on the other: the distance is −wᵀ D w
    w = torch.where(labels < n, 1 / n, -1 / len(y)).double().mT
    energy = -(w * (distances @ w)).sum(0)
    return float(energy[0]), float((energy >= energy[0]).double().mean())


def programme(quick: bool = False) -> list[tuple[Task, tuple[str, ...]]]:
    """List every task with the entries that race on it."""
    if quick:
        return [(Task(schedule, "logistic"), ENTRIES) for schedule in SCHEDULES]
    races = [
        (Task(schedule, likelihood, gamma), ENTRIES)
        for likelihood in ("logistic", "two controls", "linear-Gaussian")
        for gamma in (1.0, 0.5, 2.0)
        for schedule in SCHEDULES
    ]
    races += [(Task(schedule, "component", steps=50), ENTRIES) for schedule in SCHEDULES]
    races += [(Task(schedule, "component", steps=50, spread=0.2), ("adjoint",)) for schedule in SCHEDULES]
    races += [
        (replace(GROWING, dim=dim, steps=steps), ("adjoint",))
        for dim in (2, 32, 256)
        for steps in (25, 50)
        if (dim, steps) != (2, 25)
    ]
    return races


def races(quick: bool = False, seed: int = 0, phase: Phase = silent) -> Iterator[tuple[dict[str, Any], Picture | None]]:
    """Run the whole programme, row by row; quick is a tenth of the training on two tasks."""
    for task, names in programme(quick):
        answers = Answers(task) if task.dim <= 2 else None
        for name in names:
            yield race(task, name, answers, seed, 0.1 if quick else 1.0, phase)
