"""Count how conditions c that are drawn from a population differ: errors clustered by c, figures of each c and y.

A figure over drawn c is a ratio of sums, n_c values of sum S_c for each of G' conditions that have any:

    m = Σ_c S_c / Σ_c n_c        Var[m] = G'/(G' − 1) Σ_c (S_c − n_c m)² / (Σ_c n_c)²

The values of one c may depend on each other in any way, and the spread between the c contains that within. Enumerated
conditions are one cluster, whose error is that within; so is a population of which a single c counts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..control.conditions import Conditions
from ..system.files import finite_or_none


def clusters_of(conditions: Conditions) -> int:
    """Return how many independent clusters the pairs (c, y) fall into: G where c is drawn, 1 where it is not."""
    return conditions.groups if conditions.drawn else 1


def cluster_error(
    values: Tensor, clusters: int, within: float, counted: Tensor | None = None, unseen: Tensor | None = None
) -> float:
    """Compute the standard error of the mean of values, clustered; `within` where fewer than two clusters count.

    Args:
        values: any shape, the clusters in turn and equally many values for each.
        clusters: how many they fall into.
        within: the standard error where the clusters are fixed.
        counted: which of the values are in the mean, of the same shape; None for all.
        unseen: variances of the values that no sample shows, of the same shape, which are added; None for none.
    """
    values = values.detach().double().reshape(clusters, -1)
    counted = torch.ones_like(values) if counted is None else counted.reshape(clusters, -1).double()
    sizes = counted.sum(1)
    taking_part, total = int((sizes > 0).sum()), float(sizes.sum())
    if taking_part < 2:
        return within
    sums = values.where(counted > 0, 0.0).sum(1)
    rest = sums - sizes * sums.sum() / total
    variance = taking_part / (taking_part - 1) * rest.square().sum()
    if unseen is not None:
        variance = variance + (unseen.double().reshape(clusters, -1) * counted).sum()
    return float(variance.sqrt()) / total


@dataclass
class Breakdown:
    """Hold the figures of a certificate pair by pair, with the errors of its gap for each condition and each label."""

    conditions: list[str]  # the names of the G conditions c
    labels: list[str]  # of the K labels y
    gap: Tensor  # (G, K) in nats
    hits: Tensor  # (G, K), how many prior samples have y
    ess: Tensor  # (G, K), effective share of the policy's paths
    certified: Tensor  # (G, K), whether the gap holds
    condition_stderr: Tensor  # (G,), of the mean gap of a condition's certified pairs
    label_stderr: Tensor  # (K,), of the mean gap of a label's certified pairs, clustered where c are drawn
    drawn: bool  # whether the conditions are a sample of a population

    @property
    def clusters(self) -> int:
        """How many independent clusters the pairs fall into, see `clusters_of`."""
        return len(self.conditions) if self.drawn else 1

    @property
    def condition_gap(self) -> Tensor:
        """The mean gap (G,) of each condition's certified pairs, NaN where there is none."""
        return self.gap.where(self.certified, torch.nan).nanmean(1)

    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        """Return the figures of each label, over c, and of each condition, by the names metrics.json uses."""
        label_gap = self.gap.where(self.certified, torch.nan).nanmean(0)
        labels = [
            {
                "name": name,
                "hits_min": float(self.hits[:, k].min()),
                "hits_mean": float(self.hits[:, k].mean()),
                "ess_fraction": float(self.ess[:, k].min()),
                "certified": int(self.certified[:, k].sum()),
                "gap_nats": float(label_gap[k]),
                "gap_stderr": float(self.label_stderr[k]),
            }
            for k, name in enumerate(self.labels)
        ]
        gaps, errors = self.condition_gap.tolist(), self.condition_stderr.tolist()
        rows = zip(self.conditions, gaps, errors, self.certified.sum(1).tolist(), strict=True)
        keys = "name", "gap_nats", "gap_stderr", "certified"
        conditions = [dict(zip(keys, row, strict=True)) for row in rows]
        figures: dict[str, list[dict[str, Any]]] = finite_or_none({"labels": labels, "conditions": conditions})
        return figures
