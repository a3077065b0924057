"""Measure a run on paths of its policy and of its prior: certificate, accuracy, sweeps, and the samples of pictures.

All noise comes from streams of the run's seed and a purpose, so that a measurement is the same whenever it is made.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..chain.noise import stream
from ..chain.paths import PriorPaths, default_batch, paths, paths_with_states
from ..chain.rows import parts
from ..chain.schedule import Focus
from ..control.conditions import MOST_ENUMERATED, Conditions, ConditionSplit
from ..data.labels import NULL
from ..evaluate.certificate import Slope, certify, gamma_within
from ..evaluate.clusters import clusters_of
from ..evaluate.evaluation import Evaluation, warn_if_outside
from ..evaluate.information import Profile, denoised_paths, information
from ..evaluate.judge import Observation
from ..evaluate.scores import Nulled, Score, score_samples, score_target
from ..evaluate.verdict import Gain
from ..learn.step import steps_to_learn
from ..reward.reward import ENOUGH, prior_table
from ..system import ranks
from ..system.progress import Phase, silent
from .config import Config
from .run import Run, fits

STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
PROFILE_PATHS, LATENT_PROFILE_PATHS, LEAST_PROFILE_PATHS = 600, 200, 200  # to measure where y is decided
MOST_PROFILE_STEPS, MOST_LATENT_STEPS = 60, 24  # of the chain at which it is measured; latents are decoded at each


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
            evaluate(run, settings.paths, phase, against_untrained=True),
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


def prior_samples(
    run: Run, conditions: Conditions, members: int, purpose: str, phase: Phase = silent, states: int = 0
) -> Tensor | PriorPaths:
    """Draw independent samples of the prior, `members` for each condition in turn; of a population so many in all.

    With a number of states return paths with as many of each, at steps at which a control that is trained speaks.
    """
    n, generator = conditions.rows(members), stream(run.config.seed, purpose)
    cond = conditions.cond_of(conditions.spread(n))
    advance = phase(purpose, n)
    with run.policy.base.full_precision():
        if not states:
            return paths(run.prior.denoiser, n, run.times, generator, cond, progress=advance).x_0
        active = steps_to_learn(run.policy, run.times)
        order = torch.rand(n, len(active), generator=stream(run.config.seed, f"states of {purpose}")).argsort(1)
        steps = active[order[:, :states].sort(1).values]
        return paths_with_states(run.prior.denoiser, steps, run.times, generator, cond, advance)


@torch.no_grad()
def find_intervals(run: Run, phase: Phase = silent) -> None:
    """Choose the interval of every control whose settings say "auto", and the focus of the chain.

    The figures replace "auto" in the run's config, so that the same config trains the same control again. Where too few
    paths are sampled to measure them, controls speak everywhere.
    """
    names = [control.name for control in run.config.controls if control.interval == "auto"]
    if not names and run.config.focus != "auto":
        return
    profiles = profiles_of(run, phase) if measures_intervals(run.config) else {}
    for name, profile in profiles.items():
        run.policy.controls[name].interval = profile.interval(run.prior.denoiser)
    intervals = {name: run.policy.controls[name].interval or "none" for name in names}
    controls = [{**c.model_dump(), "interval": intervals.get(c.name, c.interval)} for c in run.config.controls]
    focus = focus_of(run) if run.config.focus == "auto" else run.config.focus
    run.config = run.config.with_(controls=controls, focus=focus)


@torch.no_grad()
def lower_gamma(run: Run, budget: float, phase: Phase = silent) -> None:
    """Lower the run's γ until the target lies within a KL of `budget` nats of the prior."""
    x_prior = prior_samples(run, run.conditions, run.config.evaluation.prior_samples, "prior samples for γ", phase)
    table = prior_table(run.reward_at(1.0), run.conditions, x_prior)
    gamma = ranks.broadcast(lambda: gamma_within(run.conditions, table, budget, run.config.gamma))
    run.config = run.config.with_(gamma=float(f"{gamma:.4g}"))
    run.policy.gamma = run.config.gamma


def measures_intervals(config: Config) -> bool:
    """Return whether a training measures where y is decided: some interval is "auto", and enough paths are sampled."""
    automatic = any(control.interval == "auto" for control in config.controls)
    return automatic and config.evaluation.paths >= LEAST_PROFILE_PATHS


def profile_paths(run: Run) -> int:
    """Return how many paths of the prior that takes, equally many for each condition."""
    groups = run.conditions.groups
    return -(-(LATENT_PROFILE_PATHS if run.prior.latent else PROFILE_PATHS) // groups) * groups


def profiles_of(run: Run, phase: Phase = silent) -> dict[str, Profile]:
    """Measure what the states of the prior's paths say about the label of each control whose interval is "auto"."""
    groups = run.conditions.groups
    group = torch.arange(groups).repeat_interleave(profile_paths(run) // groups)
    names = [control.name for control in run.config.controls if control.interval == "auto"]
    every = -(-(len(run.times) - 1) // (MOST_LATENT_STEPS if run.prior.latent else MOST_PROFILE_STEPS))
    generator, advance = stream(run.config.seed, "profile"), phase("where y is decided", len(run.times) * len(group))
    tables: dict[str, list[Tensor]] = {name: [] for name in names}
    rows = parts(len(group), default_batch(run.prior.denoiser))
    for batch in rows:
        cond = run.conditions.cond_of(group[batch])
        steps: dict[str, list[Tensor]] = {name: [] for name in names}
        with run.policy.base.full_precision():
            chain = denoised_paths(run.prior.denoiser, batch.stop - batch.start, run.times, generator, cond)
            for i, x_hat in enumerate(chain):
                advance(batch.stop - batch.start)
                if i % every == 0 or i == len(run.times) - 1:
                    for name, x in run.reward.views(x_hat, names).items():
                        steps[name].append(run.reward.table(name, x, cond).log_softmax(1).cpu())
        for name in names:
            tables[name].append(torch.stack(steps[name]))
    profiles, times = {}, run.times[:-1:every]
    for name, batches in tables.items():
        *log_p, end = torch.cat(batches, dim=1).unbind(0)
        number = torch.zeros_like(group) if run.conditions.drawn else group  # too many c to count the labels of each
        nats = [information(each, end.exp(), number, run.config.seed) for each in (*log_p, end)]
        profiles[name] = ranks.broadcast(lambda nats=nats: Profile(times, nats[: len(times)], nats[-1]))
    return profiles


def focus_of(run: Run) -> Focus | str:
    """Choose the stretch of noise levels that gets more steps: where the controls speak, unless that is nearly all.

    At most two thirds of the steps, and three times as many as there were, go there.
    """
    intervals = [control.interval for control in run.policy.controls.values()]
    if None in intervals or min(off for off, _ in intervals) == 0.0:
        return "none"
    low, high = min(off for off, _ in intervals), max(on for _, on in intervals)
    inside = sum(low <= float(run.policy.schedule(t)[1]) <= high for t in run.times[:-1]) / (len(run.times) - 1)
    density = min(3.0, 2 * (1 - inside) / max(inside, 1e-6))
    focus = tuple(float(f"{value:.4g}") for value in (low, high, density))
    return focus if density >= 1.2 and fits(run.prior, run.config.with_(focus=focus), run.config.steps) else "none"


def policy_paths(
    run: Run, conditions: Conditions, repeats: int, purpose: str, phase: Phase = silent, gamma: float | None = None,
    untrained: bool = False,
) -> PolicyPaths:  # fmt: skip
    """Draw paths of the policy at γ, None for the run's, `repeats` for every (c, y) in turn.

    If `untrained`, they are those of before its training.
    """
    pair = conditions.all(repeats)
    labels, cond = conditions.of(pair)
    control = {n: torch.full_like(y, NULL) if untrained and not run.policy.controls[n].fixed else y
               for n, y in labels.items()}  # fmt: skip
    task = f"{purpose}, uncontrolled" if untrained else purpose
    generator, advance = stream(run.config.seed, purpose), phase(task, len(pair))
    compare = not untrained or any(control.fixed for control in run.policy.controls.values())
    with run.policy.base.full_precision():
        arguments = run.policy, len(pair), run.times, generator, cond, control
        x_0, kl, log_ratio = paths(*arguments, compare=compare, progress=advance, gamma=gamma)
    rewards = run.reward_at(run.config.gamma if gamma is None else gamma)(x_0, labels, cond)
    return PolicyPaths(ranks.broadcast(lambda: rewards), x_0, kl, log_ratio)


@torch.no_grad()
def probe(run: Run, repeats: int) -> Probe:
    """Measure J, reward, KL in nats and the share outside p̂'s region, on few paths of the same noise at every probe."""
    rewards, x_0, kl, log_ratio = policy_paths(run, run.probe_conditions, repeats, "probe")
    log_w = rewards - log_ratio
    figures = {"J": log_w, "probe_reward": rewards, "probe_kl": kl}
    if run.second_opinion.outside:
        parts = [run.is_outside(part, run.images(part)) for part in x_0.split(run.prior.codec.batch)]
        figures["probe_outside"] = torch.cat(parts).float()
    return Probe({name: float(value.mean()) for name, value in figures.items()}, log_w, rewards)


def refine_intervals(run: Run, current: Probe, repeats: int) -> Probe:
    """Make a control's interval smaller for as long as that raises J, by its error, on the same paths; both ends.

    `current` is the policy's probe as it is; return the probe of what is left.
    """
    for control in run.policy.controls.values():
        for end in () if control.fixed or control.interval is None else ("off", "on"):
            while smaller := without_steps(run, control.interval, end):
                before, control.interval = control.interval, smaller
                candidate = probe(run, repeats)
                gain, error = Gain.from_paths(candidate.log_w, current.log_w)
                if not gain > error:
                    control.interval = before
                    break
                current = candidate
    return current


def without_steps(run: Run, interval: tuple[float, float], end: str) -> tuple[float, float] | None:
    """Return an interval without an eighth of its steps of the chain, at its end "off" or "on"; None if few are left.

    A new bound lies half-way, in log σ, between two steps.
    """
    off, on = interval
    sigmas = [float(run.policy.schedule(t)[1]) for t in run.times[:-1]]
    inside = [sigma for sigma in sigmas if off <= sigma <= on]  # falling
    cut = max(1, len(inside) // 8)
    if len(inside) < 2 * cut + 1:
        return None
    if end == "off":
        return ((inside[-cut - 1] * inside[-cut]) ** 0.5, on)
    return (off, (inside[cut - 1] * inside[cut]) ** 0.5)


def remeasured(run: Run, seed: int | None = None, prior_samples: int | None = None) -> Run:
    """Return the run with other noise for its measurements, and as many samples of the prior for each condition.

    A seed left out is the one after the run's, modulo 2³²: independent of what the run was trained, chosen and measured
    by, and the same each time.
    """
    config = run.config
    members, least = prior_samples or config.evaluation.prior_samples, len(run.values)
    if members < least:
        raise ValueError(f"--prior-samples {members}: give {least} at least, one for each class of the controls.")
    seed = (config.seed + 1) % 2**32 if seed is None else seed
    run.config = config.with_(seed=seed, evaluation={"prior_samples": members})
    return run


def on_prompts(run: Run, prompts: Sequence[str]) -> str:
    """Measure a run on other prompts from now on, or on a sample of many, and say which; refuse a run without text."""
    if run.prior.text is None:
        raise ValueError("--prompts: the prior of this run is given no text. Leave --prompts out.")
    order = torch.randperm(len(prompts), generator=stream(run.config.seed, "other prompts"))
    some = [prompts[i] for i in order[:MOST_ENUMERATED].sort().values]
    seen = set(some) & {run.prior.class_names[c] for c in run.split.trained}
    numbers = [run.prior.number_of(prompt) for prompt in some]
    run.split = ConditionSplit(numbers, [], True, numbers, [])
    sample = f" of {len(prompts)}, drawn by the seed" if len(some) < len(prompts) else ""
    text = f"measured on {len(some)} prompts{sample}; {len(seen)} of these were trained on"
    known = not run.second_opinion.reader or set(numbers) <= set(run.known_classes)
    return text if known else f"{text}; adherence is not measured: its reader does not know all of them"


@torch.no_grad()
def evaluate(run: Run, n: int, phase: Phase = silent, against_untrained: bool = False) -> Evaluation:
    """Evaluate the policy on at least n paths, equally many for every (c, y), against fresh samples of the prior.

    The certificate is of the training chain. With several controls each of the `partial_choices` is evaluated as well,
    of a control for several γ each other γ, both on half the paths, and conditions that were held out on as many. J is
    also compared with that of the untrained control on the same noise, if that is asked for.
    """
    members = run.config.evaluation.prior_samples
    x_prior = prior_samples(run, run.conditions, members, "prior samples for log Z", phase)
    of_prior = run.second_opinion.measure(x_prior, run.conditions)
    whole = run, run.conditions, x_prior, of_prior
    evaluation = evaluate_on(*whole, n, "paths to certify", phase, None, against_untrained)
    clip = getattr(run.prior.denoiser, "clip", None)
    evaluation.clipped = None if clip is None else float((x_prior.abs() >= clip).float().mean())
    for names in partial_choices(run):
        purpose, conditions = f"paths with {' and '.join(names)} alone", run.conditions_on(names)
        evaluation.parts[names] = evaluate_on(run, conditions, x_prior, of_prior, n // 2, purpose, phase)
    at: dict[float, Evaluation] = {}
    for gamma in run.config.trained_gammas[1:]:
        purpose = f"paths at γ = {gamma:g}"
        at[gamma] = evaluate_on(*whole, n // 2, purpose, phase, gamma)
    evaluation.gammas = dict(sorted({run.config.gamma: evaluation, **at}.items())) if at else {}
    if held_out := run.held_out_conditions:
        x_other = prior_samples(run, held_out, members, "prior samples of held-out conditions", phase)
        of_other = run.second_opinion.measure(x_other, held_out)
        evaluation.held_out = evaluate_on(run, held_out, x_other, of_other, n, "paths of held-out conditions", phase)
    return evaluation


def evaluate_on(
    run: Run, conditions: Conditions, x_prior: Tensor, of_prior: Observation, n: int, purpose: str, phase: Phase,
    gamma: float | None = None, against_untrained: bool = False,
) -> Evaluation:  # fmt: skip
    """Evaluate the policy with some of its controls at γ, None for the run's.

    `of_prior` is of the prior's samples x_prior (G · M, *).
    """
    gamma, members = run.config.gamma if gamma is None else gamma, len(x_prior) // conditions.groups
    arguments = run, conditions, repeats_of(n, conditions), purpose, phase, gamma
    rewards, x_0, kl, log_ratio = policy_paths(*arguments)
    gained = None
    if against_untrained:
        untrained = policy_paths(*arguments, untrained=True)
        log_w = (rewards - log_ratio, untrained.rewards - untrained.log_ratio)
        gained = Gain.from_paths(*log_w, conditions.pairs, clusters_of(conditions))
    table = prior_table(run.reward_at(gamma), conditions, x_prior)
    certificate = certify(conditions, table, rewards, kl, log_ratio, gamma)
    known = (certificate.hits >= ENOUGH).view(conditions.groups, -1)
    # the prior ignores y: an equal share of its samples stands for each y
    share = members // conditions.classes
    uncontrolled = (torch.arange(len(x_prior)).view(-1, members)[:, : share * conditions.classes]).flatten()
    scores = {
        "prior": score_samples(of_prior[uncontrolled], conditions),
        "target": score_target(of_prior, table, conditions, known),
        "ctrl": score_samples(run.second_opinion.measure(x_0, conditions), conditions),
    }
    nulled, clusters = {}, clusters_of(conditions)
    for name, control in run.policy.controls.items():
        if name not in conditions.controls:
            labels = {kind: score.labels[name] for kind, score in scores.items()}
            nulled[name] = Nulled.from_labels(labels, control.size, table, known, clusters)
    warn_if_outside(scores["prior"], scores["ctrl"])
    slope = Slope.at(gamma, table, rewards, known, clusters) if run.config.gammas else None
    return Evaluation(**scores, certificate=certificate, n=len(x_0), nulled=nulled, slope=slope, gained=gained)


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
        batches = zip(x_0.split(1024), cond.get("c", torch.zeros(n)).split(1024), strict=True)
        measured = [run.measure_scale(settings, run.images(part), c) for part, c in batches]
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
