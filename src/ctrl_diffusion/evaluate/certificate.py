"""How far the policy is from the exact conditional, in nats, and what a perfect learner would score.

    J(g)    = E_g[γ log p̂(y | x_0)] − KL(P_g ‖ P_pre)
    log Z   = log E_pre[p̂(y | x_0)^γ]
    log Z − J(g) = KL(P_g ‖ P*) ≥ 0

P* is the prior's own N-step chain tilted by the reward. log Z comes from independent samples of the prior, per (c, y),
then averaged uniformly; J from paths of the policy by the mean of log w = r − log p_g/p_pre, whose expectation is J and
whose spread vanishes at the optimum. log Z from the same paths (log-mean-exp of log w) is a check only: it is at least
J and blind to modes the policy misses.

Standard errors of both log Z are by the delta method, Var[log Ẑ] ≈ Var[ŵ]/Z²: one pass over the samples, and what a
bootstrap of them comes to (tests/test_certificate.py) while some tens of effective samples stand behind each. Where
they do not, no error estimate from the same samples is to be trusted; for log Z of the prior a warning says so.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chain.schedule import bisect
from ..control.conditions import Conditions


@dataclass
class Certificate:
    """The gap and its parts in nats, uniform means over pairs (c, y); `*_pairs` are per pair (G · K,).

    Args:
        objective: J.
        log_z: from independent samples of the prior.
        log_z_policy: from the policy's paths.
        gap: log_z − objective, an upper bound of the KL between the policy's and the exact x_0.
        stderr, objective_stderr, log_z_stderr, log_z_policy_stderr: of gap, J and both log Z.
        kl: KL(P_g ‖ P_pre).
        ess: effective share of the policy's paths under w, the smallest over the pairs.
        ess_prior: effective share of the prior's samples under p̂^γ, the smallest over the pairs.
        objective_pairs, objective_stderr_pairs, log_z_pairs, log_z_stderr_pairs, log_z_policy_pairs,
            log_z_policy_stderr_pairs, ess_pairs: the same per pair; ess is the paths'.
    """

    objective: float
    log_z: float
    log_z_policy: float
    gap: float
    stderr: float
    objective_stderr: float
    log_z_stderr: float
    log_z_policy_stderr: float
    kl: float
    ess: float
    ess_prior: float
    objective_pairs: Tensor
    objective_stderr_pairs: Tensor
    log_z_pairs: Tensor
    log_z_stderr_pairs: Tensor
    log_z_policy_pairs: Tensor
    log_z_policy_stderr_pairs: Tensor
    ess_pairs: Tensor

    @property
    def gap_pairs(self) -> Tensor:
        """The gap of each pair."""
        return self.log_z_pairs - self.objective_pairs

    @property
    def stderr_pairs(self) -> Tensor:
        """The standard error of each pair's gap."""
        return torch.hypot(self.log_z_stderr_pairs, self.objective_stderr_pairs)


def log_mean_exp(a: Tensor, dim: int) -> Tensor:
    """log of the mean of exp(a)."""
    return a.logsumexp(dim) - math.log(a.shape[dim])


def log_z(table: Tensor) -> tuple[Tensor, float]:
    """log Z per pair and the standard error of its mean, by the delta method.

    Args:
        table: (G, M, K), reward of every class on M samples of each of G conditions.

    Returns:
        log Z (G · K,) and the standard error of its uniform mean. The K classes of one condition share samples, so the
        error is taken of their mean, sample by sample.
    """
    z = log_mean_exp(table, dim=1)  # (G, K)
    influence = (table - z[:, None]).exp().mean(2)  # (G, M): d mean_k log Z / d sample
    stderr = (influence.var(1) / table.shape[1]).sum().sqrt() / len(table)
    return z.flatten(), float(stderr)


def tilt_kl(table: Tensor, gamma: float) -> float:
    """KL of the target from the prior in nats at γ, from rewards (G, M, K) at γ = 1: the mean over (c, y)."""
    tilted = gamma * table
    return float(((tilted.softmax(1) * tilted).sum(1) - log_mean_exp(tilted, dim=1)).mean())


def gamma_within(table: Tensor, budget: float, most: float) -> float:
    """The largest γ ≤ `most` whose target lies within a KL of `budget` nats of the prior.

    The KL grows with γ, so the target with that γ is the nearest to the posterior that the budget buys.

    Args:
        table: (G, M, K), rewards at γ = 1 of M prior samples of each condition.
        budget: mean over (c, y), positive.
        most: γ if the budget allows it.
    """
    if tilt_kl(table, most) <= budget:
        return most
    return bisect(lambda gamma: tilt_kl(table, gamma) >= budget, 0.0, most)


def certify(conditions: Conditions, table: Tensor, earned: Tensor, kl: Tensor, log_ratio: Tensor) -> Certificate:
    """The certificate from samples of prior and policy.

    Args:
        conditions: the pairs.
        table: (G, M, K), reward of every class on M independent prior samples of each condition.
        earned: (P · n,), reward of n policy paths for each pair in turn.
        kl, log_ratio: (P · n,), of the same paths.

    Warns:
        RuntimeWarning: the two estimates of log Z differ by more than three standard errors, or fewer than 30
            effective samples of the prior stand behind the log Z of some pair.
    """
    z, z_stderr = log_z(table)
    log_w = (earned - log_ratio).view(conditions.pairs, -1)  # (P, n)
    n = log_w.shape[1]
    objective, j_variance = log_w.mean(1), log_w.var(1) / n
    j_stderr = float(j_variance.sum().sqrt() / conditions.pairs)
    z_policy = log_mean_exp(log_w, dim=1)
    # variances of both estimates of log Z per pair by the delta method: the spread of w/Z over its samples
    w, w_prior, members = log_w.softmax(1), table.softmax(1), table.shape[1]
    policy_variance, prior_variance = (w * n).var(1) / n, (w_prior * members).var(1).flatten() / members
    policy_stderr = float(policy_variance.sum().sqrt() / conditions.pairs)
    ess, ess_prior = 1 / w.square().sum(1) / n, float((1 / w_prior.square().sum(1)).min())
    if ess_prior < 30:
        warnings.warn(
            f"log Z of the rarest (c, y) rests on {ess_prior:.0f} effective samples of the prior and is biased low: "
            "raise evaluation.prior_samples.",
            RuntimeWarning,
            stacklevel=2,
        )
    # to second order the log of a mean is low by half its variance
    difference = float((z_policy + policy_variance / 2 - z - prior_variance / 2).mean())
    stderr = math.hypot(z_stderr, policy_stderr)
    if abs(difference) > 3 * stderr:
        warnings.warn(
            f"log Z from the policy's paths differs from the prior's by {difference:+.3f} nats, more than three "
            f"standard errors ({stderr:.3f}): trust the prior's; the policy misses modes or its weights are uneven.",
            RuntimeWarning,
            stacklevel=2,
        )
    return Certificate(
        objective=float(objective.mean()),
        log_z=float(z.mean()),
        log_z_policy=float(z_policy.mean()),
        gap=float(z.mean() - objective.mean()),
        stderr=math.hypot(j_stderr, z_stderr),
        objective_stderr=j_stderr,
        log_z_stderr=z_stderr,
        log_z_policy_stderr=policy_stderr,
        kl=float(kl.mean()),
        ess=float(ess.min()),
        ess_prior=ess_prior / members,
        objective_pairs=objective,
        objective_stderr_pairs=j_variance.sqrt(),
        log_z_pairs=z,
        log_z_stderr_pairs=prior_variance.sqrt(),
        log_z_policy_pairs=z_policy,
        log_z_policy_stderr_pairs=policy_variance.sqrt(),
        ess_pairs=ess,
    )
