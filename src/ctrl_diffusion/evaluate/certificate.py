"""Bound how far the policy is from the exact conditional, in nats, pair by pair (c, y).

    J(g)    = E_g[γ log p̂(y | x_0)] − KL(P_g ‖ P_pre)
    log Z   = log E_pre[p̂(y | x_0)^γ]
    log Z − J(g) = KL(P_g ‖ P*) ≥ 0

P* is the prior's own N-step chain tilted by the reward. log Z comes from M independent samples of the prior for each c;
J from paths of the policy by the mean of log w = r − log p_g/p_pre, whose expectation is J and whose spread vanishes at
the optimum. log Z from the same paths (log-mean-exp of log w) is at least J and blind to modes that the policy misses.

**Hits.** As p̂ ≤ 1, the relative variance of the estimate of Z is at most 1/(M Z), one over the expected number of
samples that have y: the hits Σ_m p̂(y | x_m). What no sample shows has at 95 % a share of at most 3/M of all x (the rule
of three) and adds at most 3/M to Z, 3/hits to log Z: less than a count's own standard error 1/√hits from nine hits on.
So a pair is *certified* where ten hits stand behind its log Z. An effective share is no guard: where no sample has y,
p̂'s floor makes all weights alike. Where the floor makes up the hits themselves, the samples show no spread, and one
that has y would still change Z by its 1/hits: the standard error of log Z is 1/hits at least.

**Fewer hits.** Then both estimates are low, and the larger is nearer. The bound rests on the policy's paths where ten
of them, by p̂ and by their effective number, have y: it holds for the modes that they show, and is reported apart.
Otherwise nothing is certified for that pair. A policy's log Z clearly above the prior's, which ten hits stand behind,
is treated as few hits are. All means are over certified pairs.

**Second order.** With u = exp(r)/Z the log of a mean is low by V/2, V = Var[u]/M: it is added. The influence of a
sample on the corrected estimate is (u − 1) + (u² − E[u²] − 2 E[u²](u − 1))/(2M), the second term the correction's.

**Errors.** The K labels of one c share its prior samples, so influence is summed over y before it is squared. If p̂ is
sure and the labels' shares are even these sums vanish to first order; what is left of the mean Σ_k a_k log Z_k is
−Σ_k a_k δ_k²/2, δ_k the relative error of Z_k, of variance T = Σ_kl a_k a_l C_kl²/(2M²) with C the covariance of u. The
influence at the sample has twice as much (as a jackknife's has), so T is taken off once.

**Drawn conditions.** Where the c are a sample of a population every mean is over drawn c, and its error is clustered by
c (`clusters`): of J, of both log Z, and of the gap from the gaps of each c, since a c's log Z and J rise and fall
together. The spread between the c contains that of paths and of prior samples, and what the labels of one c share; what
no sample shows (1/hits, above) is added. A c without a certified pair is in no mean: they are then means over the part
of the population that M samples can certify. A pair near ten hits is certified where its hits, and so its log Z, came
out high: that errs on the safe side, by 0.004 nats in a toy of which 64 samples leave a tenth of the pairs uncertified.
"""

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..chain.schedule import bisect
from ..control.conditions import Conditions
from ..reward.reward import ENOUGH, SHOWN, hits, rarest
from ..system.files import finite_or_none, some_of
from .clusters import Breakdown, cluster_error, clusters_of

Value = TypeVar("Value", float, Tensor)
MEASURED = 30.0  # effective samples of a pair, from which on the KL of its target is measured
# metrics.json's names of the estimates
KEYS = {
    "objective": "objective_nats", "objective_stderr": "objective_stderr", "log_z": "log_z_nats",
    "log_z_stderr": "log_z_stderr", "log_z_policy": "log_z_policy_nats", "log_z_policy_stderr": "log_z_policy_stderr",
    "gap": "gap_nats", "stderr": "gap_stderr", "ess": "ess_fraction",
}  # fmt: skip


@dataclass
class Estimates(Generic[Value]):
    """Hold the gap and its parts in nats, with standard errors; NaN for what is not known."""

    objective: Value  # J
    objective_stderr: Value
    log_z: Value | None  # from independent samples of the prior; of a pair that is not certified the larger of both
    log_z_stderr: Value | None
    log_z_policy: Value  # from the policy's paths
    log_z_policy_stderr: Value
    gap: Value | None  # log_z − objective, an upper bound of the KL between the policy's and the exact x_0
    stderr: Value | None  # of the gap
    ess: Value  # effective share of the policy's paths under w


@dataclass
class Certificate(Estimates[float]):
    """Hold the estimates as uniform means over the certified pairs (c, y), `ess` as the smallest, and pair by pair.

    Where no pair is certified log Z and gap are None, and J and `log_z_policy` are means over all pairs.
    """

    kl: float  # KL(P_g ‖ P_pre) in nats
    ess_prior: float  # effective share of the prior's samples under p̂^γ, the smallest over the pairs
    pairs: Estimates[Tensor]  # (G · K,), y running fastest
    hits: Tensor  # (G · K,), how many of a pair's prior samples have y
    certified: Tensor  # (G · K,), whether the gap holds
    on_paths: Tensor  # (G · K,), whether it rests on the policy's paths alone
    names: list[str]  # of all pairs
    breakdown: Breakdown  # by condition c and by label y

    @property
    def uncertified(self) -> list[str]:
        """The names of the pairs that are not certified."""
        return [name for name, holds in zip(self.names, self.certified.tolist(), strict=True) if not holds]

    def metrics(self) -> dict[str, Any]:
        """Return the figures by the names metrics.json uses."""
        rests_on = [
            "prior" if a else "policy" if b else None for a, b in zip(self.certified, self.on_paths, strict=True)
        ]
        gap, stderr, count = self.pairs.gap, self.pairs.stderr, int(self.on_paths.sum())
        assert gap is not None
        assert stderr is not None
        error = float(stderr[self.on_paths].square().sum().sqrt()) / count if count else None
        error = error and cluster_error(gap, self.breakdown.clusters, error, self.on_paths)
        apart = {"pairs": count, "gap_nats": float(gap[self.on_paths].mean()), "gap_stderr": error}
        return {
            **{key: getattr(self, name) for name, key in KEYS.items()},
            "ess_prior_fraction": self.ess_prior,
            "certified_pairs": int(self.certified.sum()),
            "of_pairs": len(self.names),
            "uncertified": self.uncertified,
            "on_paths": apart if count else None,
            "pairs": {
                **{key: finite_or_none(getattr(self.pairs, name).tolist()) for name, key in KEYS.items()},
                "hits": self.hits.tolist(),
                "rests_on": rests_on,
            },
            **(self.breakdown.metrics() if self.breakdown.drawn else {}),
        }


def log_mean_exp(a: Tensor, dim: int) -> Tensor:
    """Compute the log of the mean of exp(a)."""
    return a.logsumexp(dim) - math.log(a.shape[dim])


class LogMean(NamedTuple):
    """Hold logs of means of exp(a), corrected to second order, and the influence of every sample on them."""

    value: Tensor  # (G, K)
    influence: Tensor  # (G, n, K)

    @classmethod
    def of(cls, a: Tensor) -> "LogMean":
        """Estimate them from n samples a (G, n, K)."""
        n, plain = a.shape[1], log_mean_exp(a, dim=1)
        u = (a - plain[:, None]).exp()  # of mean 1
        square = u.square().mean(1, keepdim=True)
        influence = u - 1 + (u.square() - square - 2 * square * (u - 1)) / (2 * n)
        return cls(plain + u.var(1) / (2 * n), influence)

    @property
    def stderr(self) -> Tensor:
        """The standard error of each (G, K)."""
        return (self.influence.var(1) / self.influence.shape[1]).sqrt()

    def stderr_of_mean(self, share: Tensor) -> float:
        """Return the standard error of Σ share · value, for shares (G, K)."""
        n = self.influence.shape[1]
        covariance = self.influence.mT @ self.influence / n
        second = float((share[:, :, None] * share[:, None] * covariance.square()).sum()) / (2 * n**2)
        variance = float(shared_variance(self.influence, share).sum())
        return math.sqrt(max(variance - second, second))  # of which the second-order term is a part

    def stderr_of_each_mean(self, share: Tensor) -> Tensor:
        """Return the standard errors (G,) of the sums of share · value over the K alone."""
        n = self.influence.shape[1]
        covariance = self.influence.mT @ self.influence / n
        second = (share[:, :, None] * share[:, None] * covariance.square()).sum((1, 2)) / (2 * n**2)
        return torch.maximum(shared_variance(self.influence, share) - second, second).sqrt()


def shared_variance(influence: Tensor, share: Tensor) -> Tensor:
    """Return the variance (G,) of Σ share · estimate, from influences (G, n, K) of samples that the K estimates share.

    They are summed over the estimates before they are squared; shares (G, K) of estimates that do not count are 0.
    """
    return torch.einsum("gnk,gk->gn", influence, share).var(1) / influence.shape[1]


def shared_error(influence: Tensor, share: Tensor) -> float:
    """Return the standard error of Σ share · estimate over all G · K, see `shared_variance`."""
    return float(shared_variance(influence, share).sum().sqrt())


def even_shares(counted: Tensor) -> Tensor:
    """Return the share of each pair in a mean over those that are counted, of the same shape; all 0 if none is."""
    return counted.double() / max(1, int(counted.sum()))


def log_z(table: Tensor) -> tuple[Tensor, float]:
    """Estimate log Z (G · K,) from rewards (G, M, K), and the standard error of its uniform mean."""
    z = LogMean.of(table)
    return z.value.flatten(), z.stderr_of_mean(even_shares(torch.ones_like(z.value)).to(table))


@dataclass
class Slope:
    """Hold both sides of d log Z/dγ = E_γ[log p̂], as uniform means over (c, y) in nats, with standard errors."""

    log_z: float  # d log Z/dγ, from independent samples of the prior
    log_z_stderr: float
    log_p: float  # mean log p̂ of the policy's paths at γ
    log_p_stderr: float

    @classmethod
    def at(cls, gamma: float, table: Tensor, reward: Tensor, known: Tensor | None = None, clusters: int = 1) -> "Slope":
        """Estimate it at γ, from rewards (G, M, K) of prior samples, and (P · n,) of n policy paths for each pair.

        Only pairs that are `known` (G, K) count; None for all. Errors are clustered by `clusters_of` the conditions.
        """
        known = torch.ones(table.shape[0], table.shape[2], dtype=torch.bool) if known is None else known
        if not known.any():
            return cls(*[math.nan] * 4)
        w, log_p, members, share = table.softmax(1), table / gamma, table.shape[1], even_shares(known).to(table)
        mean = (w * log_p).sum(1, keepdim=True)  # the derivative of the log-mean-exp itself
        second = members / (members - 1) * (w.square() * (log_p - mean)).sum(1)  # that of half the variance
        error = shared_error(members * w * (log_p - mean), share)
        paths, of_prior = (reward / gamma).view(mean.numel(), -1), mean.squeeze(1) + second
        of_paths = paths[known.flatten()]
        path_variance = of_paths.var(1) / of_paths.shape[1]
        path_error = float(path_variance.sum().sqrt()) / max(1, len(of_paths))
        return cls(
            float(of_prior[known].mean()), cluster_error(of_prior, clusters, error, known),
            float(of_paths.mean()), cluster_error(paths.mean(1), clusters, path_error, known),
        )  # fmt: skip


def tilt_kl(table: Tensor, gamma: float) -> float:
    """Estimate KL(target ‖ prior) in nats at γ, the mean over (c, y), from rewards (G, M, K) at γ = 1."""
    tilted = gamma * table
    return float(((tilted.softmax(1) * tilted).sum(1) - log_mean_exp(tilted, dim=1)).mean())


def gamma_within(conditions: Conditions, table: Tensor, budget: float, most: float) -> float:
    """Find the largest γ ≤ `most` whose target lies within a KL of `budget` nats of the prior.

    The KL, a mean over (c, y) from rewards (G, M, K) of prior samples at γ = 1, grows with γ: the target with that γ is
    the nearest to the posterior that the budget buys.

    Warns:
        RuntimeWarning: the KL of some pair is not measured. M samples can show log M nats at most; the KL is at most
            log(M/n), n their effective number (Rényi's divergence is above KL), which is itself known from some tens of
            samples that have y. With fewer it may lie far above.
    """
    fits = tilt_kl(table, most) <= budget
    gamma = most if fits else bisect(lambda gamma: tilt_kl(table, gamma) >= budget, 0.0, most)
    effective = 1 / (gamma * table).softmax(1).square().sum(1)
    counts, members = torch.minimum(effective, hits(table)).flatten(), table.shape[1]
    if float(counts.min()) < MEASURED:
        name = conditions.name_of(int(counts.argmin()))
        message = (
            f"kl_budget: at γ = {gamma:.3g} the target's KL, {tilt_kl(table, gamma):.2f} nats by these samples, rests "
            f"on {float(counts.min()):.1f} of {members} prior samples for {name} and may lie far above {budget:g}: "
            f"{members} samples measure {max(0.0, math.log(members / MEASURED)):.1f} nats at most. Raise "
            "evaluation.prior_samples, or set a lower gamma."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return gamma


def certify(
    conditions: Conditions, table: Tensor, reward: Tensor, kl: Tensor, log_ratio: Tensor, gamma: float = 1.0
) -> Certificate:
    """Compute the certificate from samples of prior and policy.

    Args:
        conditions: the pairs.
        table: (G, M, K), reward of every class on M independent prior samples of each condition.
        reward, kl, log_ratio: (P · n,), of n policy paths for each pair in turn.
        gamma: γ of the rewards, which are γ log p̂.

    Warns:
        RuntimeWarning: fewer than ten prior samples have y, or the policy's log Z is the clearly larger one, for some
            pair, which is then not certified; or the policy's log Z is clearly smaller on average.
    """
    log_w = (reward - log_ratio).view(conditions.pairs, -1)  # (P, n)
    n, members, shape = log_w.shape[1], table.shape[1], (conditions.groups, conditions.classes)
    objective, j_stderr = log_w.mean(1), (log_w.var(1) / n).sqrt()
    of_prior, of_policy = LogMean.of(table), LogMean.of(log_w[..., None])
    counts = hits(table, gamma).flatten()
    unseen = (1 / counts.square() - of_prior.stderr.flatten().square()).clamp(min=0)
    z, z_stderr = of_prior.value.flatten(), (of_prior.stderr.flatten().square() + unseen).sqrt()
    z_policy, policy_stderr = of_policy.value.squeeze(1), of_policy.stderr.squeeze(1)
    effective, w_prior = 1 / log_w.softmax(1).square().sum(1), table.softmax(1)

    reaches = torch.minimum(hits(reward.view(*log_w.shape, 1), gamma).squeeze(1), effective) >= ENOUGH
    # three standard errors of one pair; of many, as rarely
    most = NormalDist().inv_cdf(NormalDist().cdf(3) ** (1 / conditions.pairs))
    above = (counts >= ENOUGH) & reaches & (z_policy - z > most * torch.hypot(z_stderr, policy_stderr))
    certified = (counts >= ENOUGH) & ~above
    on_paths = ~certified & reaches
    raised = ~certified & (z_policy > z)
    best, best_stderr = torch.where(raised, z_policy, z), torch.where(raised, policy_stderr, z_stderr)
    stderr = torch.hypot(best_stderr, j_stderr)  # too large where both come of the same paths, whose gap is skewed
    blank = torch.where(certified | on_paths, 0.0, torch.nan)
    pairs = Estimates(
        objective, j_stderr, best, best_stderr, z_policy, policy_stderr, gap=best - objective + blank,
        stderr=stderr + blank, ess=effective / n,
    )  # fmt: skip

    counted, clusters = certified if certified.any() else torch.ones_like(certified), clusters_of(conditions)

    def mean(values: Tensor, within: float, unseen: Tensor | None = None) -> tuple[float, float]:
        return float(values[counted].mean()), cluster_error(values, clusters, within, counted, unseen)

    mean_z, mean_z_stderr, gap, gap_stderr = None, None, None, None
    mean_j, mean_j_stderr = mean(objective, mean_error(j_stderr[counted]))
    mean_policy, mean_policy_stderr = mean(z_policy, mean_error(policy_stderr[counted]))
    if certified.any():
        share = even_shares(certified).to(table)
        rest = float((share[certified] * unseen[certified].sqrt()).norm())
        mean_z, mean_z_stderr = mean(z, math.hypot(of_prior.stderr_of_mean(share.view(shape)), rest), unseen)
        # of one cluster the errors are within, and those of log Z and J independent
        gap, (_, gap_stderr) = mean_z - mean_j, mean(z - objective, math.hypot(mean_j_stderr, mean_z_stderr), unseen)
        below = math.hypot(mean_z_stderr, mean_policy_stderr)
        warn_of_missed_modes(mean_policy - mean_z, mean(z_policy - z, below, unseen)[1])
    warn_of_uncertified(conditions, counts, members, above, z_policy - z)
    return Certificate(
        mean_j, mean_j_stderr, mean_z, mean_z_stderr, mean_policy, mean_policy_stderr, gap, gap_stderr,
        ess=float(pairs.ess.min()), kl=float(kl.mean()), ess_prior=float((1 / w_prior.square().sum(1)).min()) / members,
        pairs=pairs, hits=counts, certified=certified, on_paths=on_paths,
        names=[conditions.name_of(pair) for pair in range(conditions.pairs)],
        breakdown=broken_down(conditions, pairs, counts, certified, of_prior, unseen),
    )  # fmt: skip


def broken_down(
    conditions: Conditions, pairs: Estimates[Tensor], counts: Tensor, certified: Tensor, of_prior: LogMean,
    unseen: Tensor,
) -> Breakdown:  # fmt: skip
    """Break a certificate's pairs (P,) down by condition, whose c is fixed, and by label, over the c."""
    shape, clusters = (conditions.groups, conditions.classes), clusters_of(conditions)
    assert pairs.gap is not None
    assert pairs.stderr is not None
    gap, stderr, j_stderr, unseen, certified = (
        t.view(shape) for t in (pairs.gap, pairs.stderr, pairs.objective_stderr, unseen, certified)
    )
    share = certified / certified.sum(1, keepdim=True)  # NaN where a condition has none
    apart = (share.square() * (unseen + j_stderr.square())).sum(1).sqrt()
    by_condition = torch.hypot(of_prior.stderr_of_each_mean(share.to(of_prior.value)), apart)
    by_label = [
        cluster_error(gap[:, k], clusters, mean_error(stderr[holds, k]), holds, unseen[:, k])
        if holds.any()
        else math.nan
        for k, holds in enumerate(certified.unbind(1))
    ]
    return Breakdown(
        conditions=[conditions.name_of_group(g) for g in range(conditions.groups)],
        labels=[conditions.name_of_label(k) for k in range(conditions.classes)],
        gap=gap, hits=counts.view(shape), ess=pairs.ess.view(shape), certified=certified,
        condition_stderr=by_condition, label_stderr=torch.tensor(by_label, dtype=torch.float64), drawn=conditions.drawn,
    )  # fmt: skip


def worst_conditions(certificate: Certificate, n: int = 10) -> list[int]:
    """List the numbers of the n conditions c with the largest gap, in falling order, of those that are certified."""
    gap = certificate.breakdown.condition_gap
    order = gap.nan_to_num(-math.inf).argsort(descending=True, stable=True)
    return order[: min(n, int((~gap.isnan()).sum()))].tolist()


def mean_error(stderr: Tensor) -> float:
    """Return the standard error of the mean of independent estimates, from theirs (n,)."""
    return float(stderr.square().sum().sqrt()) / len(stderr)


def warn_of_uncertified(
    conditions: Conditions, counts: Tensor, members: int, above: Tensor, difference: Tensor
) -> None:
    """Warn where log Z of the prior's samples, by their hits (P,) or the policy's paths, is not to be trusted."""
    if few := rarest(conditions, counts):
        message = (
            f"log Z is not certified for {int((counts < ENOUGH).sum())} of {conditions.pairs} (c, y), which too few of "
            f"{members} prior samples have: {few}. Raise evaluation.prior_samples (ctrl certify: -n)."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    if above.any():
        names = some_of([conditions.name_of(pair) for pair in above.nonzero().flatten().tolist()], SHOWN, "; ")
        message = (
            f"log Z from the policy's paths is above the prior's for {int(above.sum())} of {conditions.pairs} (c, y) "
            f"({names}), by up to {float(difference[above].max()):.3f} nats: the larger is nearer, and nothing is "
            "certified there. Raise evaluation.prior_samples (ctrl certify: -n)."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def warn_of_missed_modes(difference: float, stderr: float) -> None:
    """Warn where the policy's paths show less of log Z than the prior's samples, on average over certified pairs."""
    if difference < -3 * stderr:
        message = (
            f"log Z from the policy's paths differs from the prior's by {difference:+.3f} nats, more than three "
            f"standard errors ({stderr:.3f}): the policy misses modes or its weights are uneven. The gap counts that."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)
