"""Draw exact samples by importance resampling of the policy's paths."""

import warnings
from typing import Any

import torch
from torch import Tensor

from ..chain.denoise import Denoiser
from ..chain.paths import paths
from ..chain.rollout import Times
from ..chain.rows import equal_rows
from ..data.labels import Labels
from ..reward.reward import ENOUGH, Reward, hits
from ..system import ranks
from ..system.progress import Phase, silent

POOL, SMALLEST_POOL = 16, 1000
WARNED_SHARE, REFUSED_SHARE = 0.05, 0.005


@torch.no_grad()
def exact_samples(
    denoiser: Denoiser, reward: Reward, times: Times, generator: torch.Generator, labels: Labels,
    cond: dict[str, Tensor] | None = None, strength: float = 1.0, phase: Phase = silent, gamma: float | None = None,
) -> tuple[Tensor, float]:  # fmt: skip
    """Draw samples of the chain tilted by the reward, exact in the limit of many paths.

    For every (c, y) among the rows, POOL paths of the policy are simulated for each sample, SMALLEST_POOL at least, and
    the samples drawn from them with importance weights w = exp(r − Σ log p_g/p_pre). A path may be drawn twice.

    Args:
        denoiser, reward: the policy, and r.
        times, generator: the chain's grid, any, and the generator of all noise.
        labels, cond: n rows each.
        strength: of the control; any is exact, one near the target wastes fewer paths.
        phase: reports progress.
        gamma: at which the policy is called; None for its own. The reward's γ is what is sampled.

    Returns:
        x_0 (n, C, H, W), and the effective share of the paths under w, the smallest over (c, y). It is estimated from
        the paths themselves, and too high where hardly any of them lies where the target does.

    Raises:
        ValueError: an effective share below 0.5 %: samples would repeat a handful of paths.

    Warns:
        RuntimeWarning: an effective share below 5 %, or fewer than ten paths that have y.
    """
    cond = cond or {}
    pairs = equal_rows(labels, cond)
    pools = [max(POOL * len(rows), SMALLEST_POOL) for rows in pairs]
    advance, smallest = phase("paths to resample", sum(pools)), 1.0
    x_0 = torch.empty(0)
    for rows, pool in zip(pairs, pools, strict=True):
        y, c = ({name: row[rows[:1]].expand(pool) for name, row in values.items()} for values in (labels, cond))
        options: dict[str, Any] = {"compare": True, "progress": advance, "gamma": gamma}
        x, _, log_ratio = paths(denoiser, pool, times, generator, c, y, strength, **options)
        r = reward(x, y, c)
        log_w = ranks.broadcast(r.clone) - log_ratio
        if not log_w.isfinite().all():
            raise ValueError("exact sampling: a path's reward or weight is not finite. Check p̂ and the control.")
        if (count := float(hits(r.view(1, -1, 1)))) < ENOUGH:  # whose weights may be even for all that
            asked = ", ".join(f"{name} = {row[rows[0]]:g}" for name, row in labels.items())
            warnings.warn(
                f"exact sampling: only {count:.1f} of {pool} paths have {asked} (by number), so the samples are hardly "
                "nearer to it than the paths. Train the control further, or raise its strength.",
                RuntimeWarning, 2,
            )  # fmt: skip
        w = log_w.softmax(0)
        smallest = min(smallest, float(1 / w.square().sum()) / pool)
        if smallest < REFUSED_SHARE:
            raise ValueError(
                f"exact sampling: only {smallest:.2%} of the policy's paths count under their weights, too few to draw "
                "from. Train the control further, or sample without --exact."
            )
        x_0 = x_0 if len(x_0) else x.new_empty(sum(map(len, pairs)), *x.shape[1:])
        x_0[rows] = x[w.multinomial(len(rows), replacement=True, generator=generator)]
    if smallest < WARNED_SHARE:
        message = (
            f"exact sampling: {smallest:.1%} of the policy's paths count under their weights; samples repeat. The more "
            "the control is trained, the more paths count."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return x_0, smallest
