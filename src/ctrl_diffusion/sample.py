"""Sampling with labels, a strength, any number of steps and a seed."""

from collections.abc import Callable

import torch
from torch import Tensor

from .control import Labels
from .denoise import Denoiser
from .rollout import Times, Trajectory, rollout

Progress = Callable[[int], None]


@torch.no_grad()
def paths(
    denoiser: Denoiser,
    n: int,
    times: Times,
    generator: torch.Generator,
    cond: dict[str, Tensor] | None = None,
    labels: Labels | None = None,
    strength: float = 1.0,
    compare: bool = False,
    eta: float = 1.0,
    batch: int = 256,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Simulate n paths in batches, without a graph.

    Args:
        denoiser: prior or policy.
        n: how many.
        times: the chain's grid.
        generator: of all noise.
        cond, labels: n rows each.
        strength: w of the control.
        compare: also measure the path's KL against the prior.
        eta: churn.
        batch: paths at a time.
        progress: called with the number of paths done since the last call.

    Returns:
        x_0 (n, C, H, W); KL of each path in nats (n,); log p_g/p_pre of each path in nats (n,). The last two are zero
        unless compared.
    """
    samples, kls, log_ratios = [], [], []
    for start in range(0, n, batch):
        rows = slice(start, min(start + batch, n))
        x_1 = torch.randn(rows.stop - start, *denoiser.shape, generator=generator)
        here = {name: c[rows] for name, c in (cond or {}).items()}
        control = {"labels": {n: y[rows] for n, y in labels.items()}, "strength": strength} if labels else {}
        path: Trajectory = rollout(denoiser, x_1, times, eta, generator, compare, cond=here, **control)
        zeros = torch.zeros(len(x_1))
        samples.append(path.x_0)
        kls.append(path.kl.sum(0) if compare else zeros)
        log_ratios.append(path.log_ratio.sum(0) if compare else zeros)
        if progress:
            progress(len(x_1))
    return torch.cat(samples), torch.cat(kls), torch.cat(log_ratios)
