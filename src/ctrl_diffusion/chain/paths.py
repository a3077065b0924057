"""Simulate many paths in batches that fit into memory, on all ranks."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..data.labels import Labels
from ..reward.reward import Reward
from ..system import ranks
from ..system.progress import Phase, silent
from .denoise import Denoiser
from .noise import EVERY, normal
from .rollout import Times, rollout
from .rows import alike, parts, rows_of

Progress = Callable[[int], None]
POOL, SMALLEST_POOL = 16, 1000
WARNED_SHARE, REFUSED_SHARE = 0.05, 0.005


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
    labels: Labels | None = None,
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

    mine = batches[ranks.share(len(batches))]
    for rows in batches:
        shape = (rows.stop - rows.start, *denoiser.shape)
        # what is drawn for other ranks is drawn here as well
        noise = [normal(shape, denoiser, generator, EVERY if rows in mine else slice(0)) for _ in times]
        if rows in mine:
            found.append(simulated(rows, noise))
        if progress:
            progress(shape[0])
    if ranks.sharded() and len(mine) * ranks.count() < len(batches):  # others have one more
        simulated(slice(0, 1), [torch.zeros(1, *denoiser.shape, device=denoiser.device) for _ in times])
    x_0, kl, log_ratio = map(torch.cat, zip(*found, strict=True)) if found else [torch.empty(0)] * 3
    return ranks.gathered(x_0), ranks.gathered(kl), ranks.gathered(log_ratio)


@torch.no_grad()
def exact_samples(
    denoiser: Denoiser,
    reward: Reward,
    times: Times,
    generator: torch.Generator,
    labels: Labels,
    cond: dict[str, Tensor] | None = None,
    strength: float = 1.0,
    phase: Phase = silent,
) -> tuple[Tensor, float]:
    """Samples of the chain tilted by the reward, in the limit of many paths: importance resampling.

    For every (c, y) among the rows POOL paths of the policy are drawn for each sample, SMALLEST_POOL at least, and from
    them the samples, by w = exp(r − Σ log p_g/p_pre). A path may be drawn twice.

    Args:
        denoiser: the policy.
        reward: r.
        times: the chain's grid, any.
        generator: of all noise.
        labels, cond: n rows each.
        strength: w of the control; any is exact, one near the target wastes fewer paths.
        phase: told of progress.

    Returns:
        x_0 (n, C, H, W), and the effective share of the paths under w, the smallest over (c, y). It is estimated from
        the paths themselves, and too high where hardly any of them lies where the target does.

    Raises:
        ValueError: an effective share below 0.5 %: what would come is a handful of paths again and again.

    Warns:
        RuntimeWarning: an effective share below 5 %.
    """
    cond = cond or {}
    pairs = alike(labels, cond)
    pools = [max(POOL * len(asked), SMALLEST_POOL) for asked in pairs]
    advance, x_0, smallest = phase("paths to resample", sum(pools)), None, 1.0
    for asked, pool in zip(pairs, pools, strict=True):
        mine, given = ({name: row[asked[:1]].expand(pool) for name, row in rows.items()} for rows in (labels, cond))
        x, _, log_ratio = paths(denoiser, pool, times, generator, given, mine, strength, compare=True, progress=advance)
        earned = reward(x, mine, given)
        log_w = ranks.from_first(lambda earned=earned: earned) - log_ratio
        if not log_w.isfinite().all():
            raise ValueError("exact sampling: a path's reward or weight is not finite. Check p̂ and the control.")
        w = log_w.softmax(0)
        smallest = min(smallest, float(1 / w.square().sum()) / pool)
        if smallest < REFUSED_SHARE:
            raise ValueError(
                f"exact sampling: only {smallest:.2%} of the policy's paths count under their weights, too few to draw "
                "from. Train the control further, or sample without --exact."
            )
        x_0 = x.new_empty(sum(map(len, pairs)), *x.shape[1:]) if x_0 is None else x_0
        x_0[asked] = x[w.multinomial(len(asked), replacement=True, generator=generator)]
    if smallest < WARNED_SHARE:
        warnings.warn(
            f"exact sampling: {smallest:.1%} of the policy's paths count under their weights; samples repeat. The more "
            "the control is trained, the more paths count.",
            RuntimeWarning,
            stacklevel=2,
        )
    return x_0, smallest
