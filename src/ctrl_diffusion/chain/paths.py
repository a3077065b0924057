"""Simulate many paths in batches that fit into memory, on all ranks."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..system import ranks
from .denoise import Denoiser
from .noise import EVERY, normal
from .rollout import Times, rollout
from .rows import parts, rows_of

Progress = Callable[[int], None]


def at_once(denoiser: Denoiser) -> int:
    """Paths that go through a denoiser together: 256, or fewer of many dimensions."""
    return min(256, max(8, 2**18 // math.prod(denoiser.shape)))


@torch.no_grad()
def paths(
    denoiser: Denoiser,
    n: int,
    times: Times,
    generator: torch.Generator,
    cond: dict[str, Tensor] | None = None,
    labels: dict[str, Tensor] | None = None,
    strength: float = 1.0,
    compare: bool = False,
    eta: float = 1.0,
    batch: int | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Simulate n paths in batches, without a graph. Ranks share the batches, and each has all paths in the end.

    Args:
        denoiser: prior or policy.
        n: how many.
        times: the chain's grid.
        generator: of all noise.
        cond, labels: n rows each.
        strength: w of the control.
        compare: also measure the path's KL against the prior.
        eta: churn.
        batch: paths at a time; None for `at_once`.
        progress: called with the number of paths done since the last call.

    Returns:
        On the CPU, x_0 (n, C, H, W); KL of each path in nats (n,); log p_g/p_pre of each path in nats (n,). The last
        two are zero unless compared.
    """
    batches, found = parts(n, batch or at_once(denoiser)), []

    def simulated(rows: slice, noise: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        here = rows_of(cond or {}, rows)
        control = {"labels": rows_of(labels, rows), "strength": strength} if labels else {}
        with denoiser.frozen():
            path = rollout(denoiser, noise[0], times, eta, compare=compare, cond=here, noise=noise[1:], **control)
        zeros = torch.zeros(len(path.x_0))
        kl, log_ratio = (path.kl.sum(0), path.log_ratio.sum(0)) if compare else (zeros, zeros)
        return path.x_0.cpu(), kl.cpu(), log_ratio.cpu()

    mine = batches[ranks.rank_slice(len(batches))]
    for rows in batches:
        shape = (rows.stop - rows.start, *denoiser.shape)
        # what is drawn for other ranks is drawn here as well
        noise = [normal(shape, denoiser, generator, EVERY if rows in mine else slice(0)) for _ in times]
        if rows in mine:
            found.append(simulated(rows, noise))
        if progress:
            progress(shape[0])
    if ranks.sharded() and len(mine) * ranks.world_size() < len(batches):  # others have one more
        simulated(slice(0, 1), [torch.zeros(1, *denoiser.shape, device=denoiser.device) for _ in times])
    x_0, kl, log_ratio = map(torch.cat, zip(*found, strict=True)) if found else [torch.empty(0)] * 3
    return ranks.all_gather(x_0), ranks.all_gather(kl), ranks.all_gather(log_ratio)
