"""Measure how far a LoRA goes from its base, on the base's own Gaussian chain, and how near to the exact tilt."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...chain.denoise import Denoiser
from ...chain.noise import stream
from ...chain.paths import in_batches, paths
from ...chain.rollout import Times, rollout
from ...chain.rows import rows_of
from ...chain.schedule import bisect
from ...control.conditions import Conditions
from ...evaluate.certificate import Certificate, certify, mean_error, tilt_kl
from ...evaluate.clusters import cluster_error, clusters_of
from ...prior.prior import Prior
from ...reward.reward import prior_table
from ...system.files import finite_or_none
from ...system.progress import Phase, silent
from ..run import Run
from .aim import Aim

MEASURED = 30.0  # effective prior samples of a pair, from which on a tilt's KL is known
MOST_GAMMA, MOST_STRENGTH = 1e3, 4.0
HALVINGS = 8  # of the strength's bracket
SHIFTED = ("objective", "log_z", "log_z_policy")  # estimates to which a constant in the reward is added
PILOT = 4  # times fewer paths to search the strength on


@dataclass(frozen=True)
class Base:
    """Hold the chain that a LoRA is measured on: a prior, its grid, the conditions c, and how much is sampled."""

    prior: Prior
    times: Times
    conditions: Conditions  # K = 1
    n: int  # paths of the LoRA, and samples of the prior, over all c
    seed: int

    @property
    def repeats(self) -> int:
        """Paths of each c: at least two, since one has no spread."""
        return max(2, -(-self.n // self.conditions.groups))

    def mean(self, values: Tensor) -> tuple[float, float]:
        """Return the mean over c of values (G · repeats,) and its standard error, clustered by c where c is drawn."""
        each = values.double().view(self.conditions.groups, -1)
        within = mean_error((each.var(1) / each.shape[1]).sqrt())
        return float(each.mean()), cluster_error(each, clusters_of(self.conditions), within)


@dataclass(frozen=True)
class Distance:
    """Hold paths of a policy, their KL from the prior step by step, and their rewards."""

    x_0: Tensor  # (n, *)
    kl: Tensor  # (n, N) in nats, of each path and step
    log_ratio: Tensor  # (n,), log p_g/p_pre
    rewards: Tensor | None  # (n,), of an aim


def measure(
    base: Base, denoiser: Denoiser, aim: Aim | None, purpose: str, phase: Phase = silent, repeats: int | None = None,
    **control: Any,
) -> Distance:  # fmt: skip
    """Draw paths of a denoiser, `repeats` for each c or the base's own, and compare every step with the prior's.

    `control` are its labels, one value each, and its strength and γ, of a policy.
    """
    labels, cond = base.conditions.of(base.conditions.all(repeats or base.repeats))
    n = base.conditions.pairs * (repeats or base.repeats)
    rows_of_control = {name: torch.full((n,), y) for name, y in control.pop("labels", {}).items()}

    def simulate(rows: slice, noise: list[Tensor]) -> tuple[Tensor, ...]:
        options = {**control, **({"labels": rows_of(rows_of_control, rows)} if rows_of_control else {})}
        with denoiser.frozen():
            path = rollout(
                denoiser, noise[0], base.times, compare=True, cond=rows_of(cond, rows), noise=noise[1:], **options
            )
        return path.x_0.cpu(), path.kl.mT.cpu(), path.log_ratio.sum(0).cpu()

    generator, advance = stream(base.seed, purpose), phase(purpose, n)
    with torch.no_grad(), base.prior.denoiser.full_precision():
        x_0, kl, log_ratio = in_batches(denoiser, n, len(base.times), generator, simulate, None, advance, 3)
        rewards = aim.reward(base.prior)(x_0, labels, cond) if aim else None
    return Distance(x_0, kl, log_ratio, rewards)


def distance_metrics(base: Base, distance: Distance) -> dict[str, Any]:
    """Return KL in all, step by step and condition by condition, by the names certify.json uses."""
    steps, groups = [], base.conditions.groups
    for i, (t, _) in enumerate(pairwise(base.times)):
        kl, error = base.mean(distance.kl[:, i])
        steps.append({"t": t, "sigma": float(base.prior.denoiser.schedule(t)[1]), "kl_nats": kl, "kl_stderr": error})
    each = distance.kl.sum(1).double().view(groups, -1)
    total, error = base.mean(distance.kl.sum(1))
    return {
        "kl_nats": total, "kl_stderr": error, "kl_per_step": steps,
        "kl_per_prompt": [
            {"name": base.conditions.name_of_group(g), "kl_nats": float(row.mean()),
             "kl_stderr": float((row.var() / len(row)).sqrt())}
            for g, row in enumerate(each)
        ] if base.conditions.cond else [],
    }  # fmt: skip


def certificate_of(base: Base, table: Tensor, distance: Distance, aim: Aim) -> Certificate:
    """Certify a policy's paths against the prior's rewards (G, M, 1) by `certify`.

    A rating has no known bound as log p̂ has, 0: the largest seen stands for it while hits are counted. A constant in
    the reward shifts J and log Z alike, and is added again.
    """
    shift = 0.0 if aim.bounded else float(torch.maximum(table.max(), distance.rewards.max()))
    gamma = aim.gamma if aim.bounded else 1.0
    kl = distance.kl.sum(1)
    result = certify(base.conditions, table - shift, distance.rewards - shift, kl, distance.log_ratio, gamma)
    if not shift:
        return result
    pairs = replace(result.pairs, **{name: getattr(result.pairs, name) + shift for name in SHIFTED})
    shifted = {name: value + shift for name in SHIFTED if (value := getattr(result, name)) is not None}
    return replace(result, pairs=pairs, **shifted)


def certificate_metrics(base: Base, table: Tensor, distance: Distance, aim: Aim) -> dict[str, Any]:
    """Return the certificate and the mean of log p̂, or of the rating, by the names certify.json uses.

    Beside it stands the most that any policy with the same KL has, by the prior's samples, where these show it.
    """
    score, error = base.mean(distance.rewards / aim.gamma)
    return {
        "score": score, "score_stderr": error,
        "best_score": best_score(table / aim.gamma, float(distance.kl.sum(1).mean())),
        "certificate": certificate_of(base, table, distance, aim).metrics(),
    }  # fmt: skip


def best_score(table: Tensor, kl: float) -> float | None:
    """Return the largest mean score within a KL of the prior, from scores (G, M, 1) of its samples; None if unknown.

    By the Gibbs variational principle it is that of p exp(γ s)/Z, at the γ with that KL. M samples show log(M/30) nats.
    """
    if kl > math.log(table.shape[1] / MEASURED) or tilt_kl(table, MOST_GAMMA) < kl:
        return None
    gamma = bisect(lambda gamma: tilt_kl(table, gamma) >= kl, 0.0, MOST_GAMMA)
    weights = (gamma * table).softmax(1)
    if float(1 / weights.square().sum(1).max()) < MEASURED:
        return None
    return float((weights * table).sum(1).mean())


def rewards_of_prior(base: Base, aim: Aim, phase: Phase = silent) -> Tensor:
    """Return the rewards (G, M, 1) of independent samples of the prior, M for each c."""
    members, purpose = base.repeats, "prior samples for log Z"
    conditions = base.conditions
    n = conditions.rows(members)
    generator, cond = stream(base.seed, purpose), conditions.cond_of(conditions.spread(n))
    with torch.no_grad(), base.prior.denoiser.full_precision():
        x_0 = paths(base.prior.denoiser, n, base.times, generator, cond, progress=phase(purpose, n)).x_0
        return prior_table(aim.reward(base.prior), conditions, x_0)


@dataclass(frozen=True)
class Rival:
    """Hold a run of ours to set beside a LoRA: its policy at one label y, at the strength that has the LoRA's KL."""

    run: Run
    y: int

    def metrics(self, base: Base, table: Tensor, aim: Aim, kl: float, phase: Phase = silent) -> dict[str, Any]:
        """Search the strength on fewer paths of one noise, and measure it there and at strength 1."""
        strength, reached = self.strength_at(base, kl, phase)
        rows = []
        for w in dict.fromkeys((strength, 1.0)):
            distance = self.measure(base, aim, w, f"paths of the run at strength {w:.3g}", phase)
            total, error = base.mean(distance.kl.sum(1))
            figures = certificate_metrics(base, table, distance, aim)
            rows.append({"strength": w, "kl_nats": total, "kl_stderr": error, **figures})
        return {"same_kl": reached, "rows": rows}

    def measure(
        self, base: Base, aim: Aim | None, strength: float, purpose: str, phase: Phase, repeats: int | None = None
    ) -> Distance:
        """Measure the run's policy at a strength."""
        labels = {self.run.names[0]: self.y}
        return measure(base, self.run.policy, aim, purpose, phase, repeats, labels=labels, strength=strength)

    def strength_at(self, base: Base, kl: float, phase: Phase) -> tuple[float, bool]:
        """Return the strength whose KL is so many nats, and whether there is one up to the largest tried."""
        if kl == 0:
            return 0.0, True
        repeats = max(2, base.repeats // PILOT)
        paths_each = base.conditions.pairs * repeats
        advance = phase("search of the run's strength", (HALVINGS + 2) * paths_each)

        def kl_at(w: float) -> float:
            purpose = "strength of the run"  # names the noise: the same at every strength
            return float(self.measure(base, None, w, purpose, lambda *_: advance, repeats).kl.sum(1).mean())

        if kl_at(1.0) >= kl:
            low, high = 0.0, 1.0
            advance(paths_each)  # the largest need not be tried
        else:
            low, high = 1.0, MOST_STRENGTH
            if kl_at(high) < kl:
                advance(HALVINGS * paths_each)
                return high, False
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if kl_at(middle) >= kl else (middle, high)
        return (low + high) / 2, True


def certify_lora(
    base: Base, denoiser: Denoiser, aim: Aim | None = None, rival: Rival | None = None, phase: Phase = silent
) -> dict[str, Any]:
    """Measure a LoRA on its base, against an aim if there is one; return the figures of certify.json."""
    distance = measure(base, denoiser, aim, "paths of the LoRA", phase)
    figures = {"samples": len(distance.x_0), **distance_metrics(base, distance)}
    if aim:
        table = rewards_of_prior(base, aim, phase)
        figures |= {"aim": aim.metrics(), "prior_samples": table.shape[1] * base.conditions.groups}
        figures["prior_score"] = float(table.mean()) / aim.gamma
        figures |= certificate_metrics(base, table, distance, aim)
        if rival:
            figures["run"] = rival.metrics(base, table, aim, figures["kl_nats"], phase)
    return finite_or_none(figures)
