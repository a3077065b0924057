"""Bound how far the policy is from the exact conditional, in nats.

    J(g)    = E_g[γ log p̂(y | x_0)] − KL(P_g ‖ P_pre)
    log Z   = log E_pre[p̂(y | x_0)^γ]
    log Z − J(g) = KL(P_g ‖ P*) ≥ 0

P* is the prior's own N-step chain tilted by the reward. log Z comes from independent samples of the prior, per (c, y),
then averaged uniformly; J from paths of the policy by the mean of log w = r − log p_g/p_pre, whose expectation is J and
whose spread vanishes at the optimum. log Z from the same paths (log-mean-exp of log w) is only a check: it is at least
J and blind to modes that the policy misses.

Standard errors of both log Z are by the delta method, Var[log Ẑ] ≈ Var[ŵ]/Z²: equal to a bootstrap's with some tens of
effective samples (tests/evaluate/test_certificate.py). With fewer, none from the same samples can be trusted.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..chain.schedule import bisect
from ..control.conditions import Conditions

Value = TypeVar("Value", float, Tensor)
# metrics.json's names of the estimates
KEYS = {
    "objective": "objective_nats", "objective_stderr": "objective_stderr", "log_z": "log_z_nats",
    "log_z_stderr": "log_z_stderr", "log_z_policy": "log_z_policy_nats", "log_z_policy_stderr": "log_z_policy_stderr",
    "gap": "gap_nats", "stderr": "gap_stderr", "ess": "ess_fraction",
}  # fmt: skip


@dataclass
class Estimates(Generic[Value]):
    """Hold the gap and its parts in nats, with standard errors."""

    objective: Value  # J
    objective_stderr: Value
    log_z: Value  # from independent samples of the prior
    log_z_stderr: Value
    log_z_policy: Value  # from the policy's paths
    log_z_policy_stderr: Value
    gap: Value  # log_z − objective, an upper bound of the KL between the policy's and the exact x_0
    stderr: Value  # of the gap
    ess: Value  # effective share of the policy's paths under w


@dataclass
class Certificate(Estimates[float]):
    """Hold the estimates as uniform means over pairs (c, y), `ess` as the smallest, and pair by pair."""

    kl: float  # KL(P_g ‖ P_pre) in nats
    ess_prior: float  # effective share of the prior's samples under p̂^γ, the smallest over the pairs
    pairs: Estimates[Tensor]  # (G · K,), y running fastest

    def metrics(self) -> dict[str, Any]:
        """Return the figures by the names metrics.json uses."""
        return {
            **{key: getattr(self, name) for name, key in KEYS.items()},
            "ess_prior_fraction": self.ess_prior,
            "pairs": {key: getattr(self.pairs, name).tolist() for name, key in KEYS.items()},
        }


def log_mean_exp(a: Tensor, dim: int) -> Tensor:
    """Compute the log of the mean of exp(a)."""
    return a.logsumexp(dim) - math.log(a.shape[dim])


def log_z(table: Tensor) -> tuple[Tensor, float]:
    """Estimate log Z (G · K,) from rewards (G, M, K), and the standard error of its uniform mean."""
    z = log_mean_exp(table, dim=1)  # (G, K)
    # the K classes of one condition share samples, so the error is taken of their mean, sample by sample
    influence = (table - z[:, None]).exp().mean(2)  # (G, M): d mean_k log Z / d sample
    stderr = (influence.var(1) / table.shape[1]).sum().sqrt() / len(table)
    return z.flatten(), float(stderr)


@dataclass
class Slope:
    """Hold both sides of d log Z/dγ = E_γ[log p̂], as uniform means over (c, y) in nats, with standard errors."""

    log_z: float  # d log Z/dγ, from independent samples of the prior
    log_z_stderr: float
    log_p: float  # mean log p̂ of the policy's paths at γ
    log_p_stderr: float

    @classmethod
    def at(cls, gamma: float, table: Tensor, reward: Tensor) -> "Slope":
        """Estimate it at γ, from rewards (G, M, K) of prior samples, and (P · n,) of n policy paths for each pair."""
        w, log_p = table.softmax(1), table / gamma
        mean = (w * log_p).sum(1, keepdim=True)  # the derivative of the log-mean-exp itself
        # of a ratio of sums, by the delta method; the K classes of one condition share samples
        influence = table.shape[1] * (w * (log_p - mean)).mean(2)
        stderr = float((influence.var(1) / table.shape[1]).sum().sqrt() / len(table))
        of_paths = (reward / gamma).view(mean.numel(), -1)
        variance = of_paths.var(1) / of_paths.shape[1]
        return cls(float(mean.mean()), stderr, float(of_paths.mean()), float(variance.sum().sqrt() / len(variance)))


def tilt_kl(table: Tensor, gamma: float) -> float:
    """Estimate KL(target ‖ prior) in nats at γ, the mean over (c, y), from rewards (G, M, K) at γ = 1."""
    tilted = gamma * table
    return float(((tilted.softmax(1) * tilted).sum(1) - log_mean_exp(tilted, dim=1)).mean())


def gamma_within(table: Tensor, budget: float, most: float) -> float:
    """Find the largest γ ≤ `most` whose target lies within a KL of `budget` nats of the prior.

    The KL, a mean over (c, y) from rewards (G, M, K) of prior samples at γ = 1, grows with γ: the target with that γ is
    the nearest to the posterior that the budget buys.
    """
    if tilt_kl(table, most) <= budget:
        return most
    return bisect(lambda gamma: tilt_kl(table, gamma) >= budget, 0.0, most)


def certify(conditions: Conditions, table: Tensor, reward: Tensor, kl: Tensor, log_ratio: Tensor) -> Certificate:
    """Compute the certificate from samples of prior and policy.

    Args:
        conditions: the pairs.
        table: (G, M, K), reward of every class on M independent prior samples of each condition.
        reward, kl, log_ratio: (P · n,), of n policy paths for each pair in turn.

    Warns:
        RuntimeWarning: the two estimates of log Z differ by more than three standard errors, or fewer than 30
            effective samples of the prior stand behind the log Z of some pair.
    """
    z, z_stderr = log_z(table)
    log_w = (reward - log_ratio).view(conditions.pairs, -1)  # (P, n)
    n, members = log_w.shape[1], table.shape[1]
    objective, j_variance = log_w.mean(1), log_w.var(1) / n
    j_stderr = float(j_variance.sum().sqrt() / conditions.pairs)
    z_policy = log_mean_exp(log_w, dim=1)
    # variances of both estimates of log Z per pair by the delta method: the spread of w/Z over its samples
    w, w_prior = log_w.softmax(1), table.softmax(1)
    policy_variance, prior_variance = (w * n).var(1) / n, (w_prior * members).var(1).flatten() / members
    policy_stderr = float(policy_variance.sum().sqrt() / conditions.pairs)
    ess, ess_prior = 1 / w.square().sum(1) / n, float((1 / w_prior.square().sum(1)).min())
    # to second order the log of a mean is low by half its variance
    difference = float((z_policy + policy_variance / 2 - z - prior_variance / 2).mean())
    warn_of_log_z(ess_prior, difference, math.hypot(z_stderr, policy_stderr))
    pairs = Estimates(
        objective, j_variance.sqrt(), z, prior_variance.sqrt(), z_policy, policy_variance.sqrt(), gap=z - objective,
        stderr=torch.hypot(prior_variance.sqrt(), j_variance.sqrt()), ess=ess,
    )  # fmt: skip
    return Certificate(
        float(objective.mean()), j_stderr, float(z.mean()), z_stderr, float(z_policy.mean()), policy_stderr,
        gap=float(z.mean() - objective.mean()), stderr=math.hypot(j_stderr, z_stderr), ess=float(ess.min()),
        kl=float(kl.mean()), ess_prior=ess_prior / members, pairs=pairs,
    )  # fmt: skip


def warn_of_log_z(ess: float, difference: float, stderr: float) -> None:
    """Warn where log Z of the prior's samples is not to be trusted, or the policy's paths do not confirm it."""
    few = (
        f"log Z of the rarest (c, y) rests on {ess:.0f} effective samples of the prior and is biased low: raise "
        "evaluation.prior_samples."
    )
    unlike = (
        f"log Z from the policy's paths differs from the prior's by {difference:+.3f} nats, more than three standard "
        f"errors ({stderr:.3f}): trust the prior's; the policy misses modes or its weights are uneven."
    )
    for message, holds in ((few, ess < 30), (unlike, abs(difference) > 3 * stderr)):
        if holds:
            warnings.warn(message, RuntimeWarning, stacklevel=3)
