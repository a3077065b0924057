"""Measure a run on paths of its policy and of its prior: certificate, accuracy, sweeps, and the samples of pictures.

All noise comes from streams of the run's seed and a purpose, so that a measurement is the same whenever it is made.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..chain.noise import stream
from ..chain.paths import paths
from ..control.conditions import Conditions
from ..data.labels import NULL
from ..evaluate.certificate import certify, gamma_within
from ..evaluate.evaluation import Evaluation, leaves_region, warn_if_outside
from ..evaluate.judge import Observation
from ..evaluate.scores import Nulled, Score, score_samples, score_target
from ..reward.reward import prior_table
from ..system import ranks
from ..system.progress import Phase, silent
from .run import Run, fits

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)


class PolicyPaths(NamedTuple):
    """Hold paths of the policy: reward (n,), x_0 (n, *), KL from the prior and log p_g/p_pre (n,) of each, in nats."""

    rewards: Tensor
    x_0: Tensor
    kl: Tensor
    log_ratio: Tensor


class Probe(NamedTuple):
    """Hold a probe of the policy: its figures for the log, and log w and reward (n,) of its paths."""

    figures: dict[str, float]
    log_w: Tensor
    rewards: Tensor


class ScaleSamples(NamedTuple):
    """Hold the places on a control's scale that were requested, and those measured in the samples: (n,) and (n,)."""

    requested: Tensor
    measured: Tensor


class Measurements(NamedTuple):
    """Hold what a finished run is measured by: its evaluation, samples of each control on a scale, and the sweeps."""

    evaluation: Evaluation
    scales: dict[str, ScaleSamples]
    sweep: dict[str, dict[float, Score]]  # "strength" and "steps" → value → score

    @classmethod
    def from_run(cls, run: Run, phase: Phase = silent) -> "Measurements":
        """Measure a run as its settings of `evaluation` say."""
        settings = run.config.evaluation
        return cls(
            evaluate(run, settings.paths, phase),
            sample_scales(run, settings.paths // 2, phase),
            sweep(run, STRENGTHS, step_counts(run), settings.sweep_paths, phase),
        )


def repeats_of(n: int, conditions: Conditions) -> int:
    """Return how often every (c, y) occurs among at least n paths; at least twice, since one path has no spread."""
    return max(2, -(-n // conditions.pairs))


def step_counts(run: Run) -> list[int]:
    """Return the numbers of steps to sweep: half the run's own, its own and twice as many, if the prior has them."""
    steps = run.config.steps
    return [k for k in (steps // 2, steps, 2 * steps) if k > 0 and fits(run.prior, run.config, k)]


def partial_choices(run: Run) -> list[tuple[str, ...]]:
    """Return the choices of controls that are evaluated beside all together: each alone, and all but one."""
    names = run.names
    if len(names) < 2:
        return []
    return list(dict.fromkeys([*((n,) for n in names), *(tuple(n for n in names if n != name) for name in names)]))


def prior_samples(run: Run, members: int, purpose: str, phase: Phase = silent) -> Tensor:
    """Draw independent samples of the prior, `members` for each condition in turn."""
    cond = run.conditions.cond_of(torch.arange(run.conditions.groups).repeat_interleave(members))
    n, generator = members * run.conditions.groups, stream(run.config.seed, purpose)
    with run.policy.base.full_precision():
        return paths(run.prior.denoiser, n, run.times, generator, cond, progress=phase(purpose, n)).x_0


@torch.no_grad()
def lower_gamma(run: Run, budget: float, phase: Phase = silent) -> None:
    """Lower the run's γ until the target lies within a KL of `budget` nats of the prior."""
    x_prior = prior_samples(run, run.config.evaluation.prior_samples, "prior samples for γ", phase)
    table = prior_table(run.reward_at(1.0), run.conditions, x_prior)
    gamma = ranks.broadcast(lambda: gamma_within(table, budget, run.config.gamma))
    run.config = run.config.with_(gamma=float(f"{gamma:.4g}"))


def policy_paths(run: Run, conditions: Conditions, repeats: int, purpose: str, phase: Phase = silent) -> PolicyPaths:
    """Draw paths of the policy, `repeats` for every (c, y) in turn."""
    pair = conditions.all(repeats)
    labels, cond = conditions.of(pair)
    generator, advance = stream(run.config.seed, purpose), phase(purpose, len(pair))
    arguments = run.policy, len(pair), run.times, generator, cond, labels
    with run.policy.base.full_precision():
        x_0, kl, log_ratio = paths(*arguments, compare=True, progress=advance)
    rewards = run.reward(x_0, labels, cond)
    return PolicyPaths(ranks.broadcast(lambda: rewards), x_0, kl, log_ratio)


@torch.no_grad()
def probe(run: Run, repeats: int) -> Probe:
    """Measure J, reward, KL in nats and the share outside p̂'s region, on few paths of the same noise at every probe."""
    rewards, x_0, kl, log_ratio = policy_paths(run, run.training_conditions, repeats, "probe")
    log_w = rewards - log_ratio
    figures = {"J": log_w, "probe_reward": rewards, "probe_kl": kl}
    if run.second_opinion.outside:
        parts = [run.is_outside(part, run.images(part)) for part in x_0.split(run.prior.codec.batch)]
        figures["probe_outside"] = torch.cat(parts).float()
    return Probe({name: float(value.mean()) for name, value in figures.items()}, log_w, rewards)


@torch.no_grad()
def evaluate(run: Run, n: int, phase: Phase = silent) -> Evaluation:
    """Evaluate the policy on at least n paths, equally many for every (c, y), against fresh samples of the prior.

    The certificate is of the training chain. With several controls each of the `partial_choices` is evaluated as well,
    on half the paths.
    """
    x_prior = prior_samples(run, run.config.evaluation.prior_samples, "prior samples for log Z", phase)
    of_prior = run.second_opinion.measure(x_prior, run.conditions)
    evaluation = evaluate_on(run, run.conditions, x_prior, of_prior, n, "paths to certify", phase)
    for names in partial_choices(run):
        purpose, conditions = f"paths with {' and '.join(names)} alone", run.conditions_on(names)
        evaluation.parts[names] = evaluate_on(run, conditions, x_prior, of_prior, n // 2, purpose, phase)
    return evaluation


def evaluate_on(
    run: Run, conditions: Conditions, x_prior: Tensor, of_prior: Observation, n: int, purpose: str, phase: Phase
) -> Evaluation:
    """Evaluate the policy with some of its controls; `of_prior` is of the prior's samples x_prior (G · M, *)."""
    members = len(x_prior) // conditions.groups
    rewards, x_0, kl, log_ratio = policy_paths(run, conditions, repeats_of(n, conditions), purpose, phase)
    table = prior_table(run.reward, conditions, x_prior)
    # the prior ignores y: an equal share of its samples stands for each y
    share = members // conditions.classes
    uncontrolled = (torch.arange(len(x_prior)).view(-1, members)[:, : share * conditions.classes]).flatten()
    scores = {
        "prior": score_samples(of_prior[uncontrolled], conditions),
        "target": score_target(of_prior, table, conditions),
        "ctrl": score_samples(run.second_opinion.measure(x_0, conditions), conditions),
    }
    nulled = {
        name: Nulled.from_labels({kind: score.labels[name] for kind, score in scores.items()}, control.size, table)
        for name, control in run.policy.controls.items()
        if name not in conditions.controls
    }
    certificate = certify(conditions, table, rewards, kl, log_ratio)
    warn_if_outside(scores["prior"], scores["ctrl"])
    return Evaluation(**scores, certificate=certificate, n=len(x_0), nulled=nulled)


@torch.no_grad()
def sample_scales(run: Run, n: int, phase: Phase = silent) -> dict[str, ScaleSamples]:
    """Draw for each control on a scale n samples at evenly spread places, and measure where they lie."""
    scales = {}
    for settings in run.config.controls:
        control = run.policy.controls[settings.name]
        if not control.scale:
            continue
        requested, purpose = torch.linspace(0, control.size - 1, n), f"values of {settings.name}"
        cond = run.conditions.cond_of(torch.arange(n) % run.conditions.groups)
        generator, labels = stream(run.config.seed, purpose), {settings.name: requested}
        x_0 = paths(run.policy, n, run.times, generator, cond, labels, progress=phase(purpose, n)).x_0
        measured = [run.measure_scale(settings, run.images(part)) for part in x_0.split(1024)]
        scales[settings.name] = ScaleSamples(requested, torch.cat(measured))
    return scales


@torch.no_grad()
def sweep(
    run: Run, strengths: Sequence[float], steps: Sequence[int], n: int, phase: Phase = silent
) -> dict[str, dict[float, Score]]:  # "strength" and "steps" → value → score
    """Score other strengths and numbers of steps, each on about n samples of the same noise."""
    pair = run.conditions.all(repeats_of(n, run.conditions))
    labels, cond = run.conditions.of(pair)
    points = [("strength", w, w, run.config.steps) for w in strengths] + [("steps", k, 1.0, k) for k in steps]
    advance = phase("strengths and step counts", len(pair) * len(points))
    scores: dict[str, dict[float, Score]] = {"strength": {}, "steps": {}}
    for kind, value, strength, count in points:
        generator, times = stream(run.config.seed, "sweep"), run.times_of(count)
        x_0 = paths(run.policy, len(pair), times, generator, cond, labels, strength, progress=advance).x_0
        scores[kind][value] = score_samples(run.second_opinion.measure(x_0, run.conditions), run.conditions)
    return scores


@torch.no_grad()
def outside_share(run: Run, x_0: Tensor, images: Tensor) -> float | None:
    """Return the share of samples (n, *), with their images, outside the region some p̂ was fitted on; None if unknown.

    Warn if it is more than twice the prior's share, and more by three standard errors.
    """
    if not run.second_opinion.outside:
        return None
    share, usual = float(run.is_outside(x_0, images).float().mean()), run.prior_outside
    if leaves_region(share, usual, (usual * (1 - usual) / len(x_0)) ** 0.5):
        text = f"{share:.0%} of the samples lie outside the region the classifier was fitted on, of the prior's"
        advice = "there p̂ has seen no labels. Compare the judge in report.html."
        warnings.warn(f"{text} {usual:.0%}: {advice}", RuntimeWarning, stacklevel=2)
    return share


class PictureSamples(NamedTuple):
    """Hold the samples that the pictures of a run show (see `same_noise` and `plane`); ranks draw them together."""

    prior: Tensor
    ctrl: Tensor
    plane: Tensor | None  # None with one control

    @classmethod
    def from_run(cls, run: Run) -> "PictureSamples":
        """Draw them."""
        prior, ctrl = (same_noise(run, strength, columns_of(run)) for strength in (0.0, 1.0))
        return cls(prior, ctrl, plane(run) if len(run.names) > 1 else None)


def columns_of(run: Run) -> int:
    """Return the columns of the grid of samples: the prior's classes, ten at most, or ten draws without classes."""
    return 10 if run.config.classes is None else min(10, len(run.config.classes))


def same_noise(run: Run, strength: float, columns: int) -> Tensor:
    """Draw samples for every y and column, columns running fastest; a column has the same noise for every y.

    Columns are the prior's classes in turn, or draws of an unconditional prior.
    """
    classes = run.config.classes
    cond = {} if classes is None else {"c": torch.tensor(classes)[torch.arange(columns) % len(classes)]}
    conditions, rows = run.conditions, []
    for labels in conditions.combinations:
        y = {name: label.expand(columns) for name, label in zip(conditions.controls, labels, strict=True)}
        rows.append(run.sample(y, strength=strength, generator=stream(run.config.seed, "grid"), **cond))
    return torch.cat(rows)


def plane(run: Run, across: int = 4) -> Tensor:
    """Draw `across` samples for each pair of values of the first two controls, each also left out (which comes first).

    All pairs have the same noise and, if the prior has classes, the middle one of those trained. Shape of the result:
    (1 + classes of the first, 1 + of the second, across, C, H, W).
    """
    (first, rows), (second, columns) = [(n, len(run.policy.controls[n].values)) for n in run.names[:2]]
    classes, samples = run.config.classes, []
    cond = {} if classes is None else {"c": torch.full((across,), classes[len(classes) // 2])}
    for i in range(NULL, rows):
        for j in range(NULL, columns):
            y = {first: torch.full((across,), i), second: torch.full((across,), j)}
            samples.append(run.sample(y, generator=stream(run.config.seed, "plane"), **cond))
    return torch.cat(samples).unflatten(0, (-1, columns + 1, across))
