"""Simulate many paths in batches that fit into memory, on all ranks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..system import ranks
from .denoise import Denoiser
from .noise import EVERY, normal
from .rollout import Times, rollout
from .rows import parts, rows_of


class Paths(NamedTuple):
    """Hold the ends of n paths on the CPU."""

    x_0: Tensor  # (n, *)
    kl: Tensor  # of each path against the prior in nats (n,); zero unless compared
    log_ratio: Tensor  # log p_g/p_pre of each path in nats (n,); zero unless compared


def default_batch(denoiser: Denoiser) -> int:
    """Return how many paths to simulate together: 256, or fewer of many dimensions."""
    return min(256, max(8, 2**18 // math.prod(denoiser.shape)))


@torch.no_grad()
def paths(
    denoiser: Denoiser, n: int, times: Times, generator: torch.Generator, cond: dict[str, Tensor] | None = None,
    labels: dict[str, Tensor] | None = None, strength: float = 1.0, compare: bool = False, eta: float = 1.0,
    batch: int | None = None, progress: Callable[[int], None] | None = None,
) -> Paths:  # fmt: skip
    """Simulate n paths in batches, without a graph; ranks share the batches, and each returns all paths.

    Args:
        denoiser: prior or policy.
        times: the chain's grid.
        generator: of all noise.
        cond, labels: n rows each.
        strength: w of the control.
        compare: also measure the path's KL against the prior.
        eta: churn.
        batch: paths at a time; None for 256, or fewer of many dimensions.
        progress: called with the number of paths done since the last call.
    """
    batches, results = parts(n, batch or default_batch(denoiser)), []

    def simulate(rows: slice, noise: list[Tensor]) -> Paths:
        control = {"labels": rows_of(labels, rows), "strength": strength} if labels else {}
        options = {"compare": compare, "cond": rows_of(cond or {}, rows), "noise": noise[1:], **control}
        with denoiser.frozen():
            path = rollout(denoiser, noise[0], times, eta, **options)
        zeros = torch.zeros(len(path.x_0))
        kl, log_ratio = (path.kl.sum(0), path.log_ratio.sum(0)) if compare else (zeros, zeros)
        return Paths(path.x_0.cpu(), kl.cpu(), log_ratio.cpu())

    rank_batches = batches[ranks.rank_slice(len(batches))]
    for rows in batches:
        shape = (rows.stop - rows.start, *denoiser.shape)
        # the noise of other ranks' batches is drawn, too, but not moved
        noise = [normal(shape, denoiser, generator, EVERY if rows in rank_batches else slice(0)) for _ in times]
        if rows in rank_batches:
            results.append(simulate(rows, noise))
        if progress:
            progress(shape[0])
    if ranks.sharded() and len(rank_batches) * ranks.world_size() < len(batches):  # other ranks have one batch more
        simulate(slice(0, 1), [torch.zeros(1, *denoiser.shape, device=denoiser.device) for _ in times])
    values = map(torch.cat, zip(*results, strict=True)) if results else [torch.empty(0)] * 3
    return Paths(*(ranks.all_gather(value) for value in values))
