"""Simulate many paths in batches that fit into memory, on all ranks."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..system import ranks
from .denoise import Denoiser
from .noise import EVERY, Generators, generators_of, normal
from .rollout import Times, read_out, rollout
from .rows import parts, rows_of
from .transition import step


class Paths(NamedTuple):
    """Hold the ends of n paths on the CPU."""

    x_0: Tensor  # (n, *)
    kl: Tensor  # of each path against the prior in nats (n,); zero unless compared
    log_ratio: Tensor  # log p_g/p_pre of each path in nats (n,); zero unless compared


class PriorPaths(NamedTuple):
    """Hold the ends of n paths of the prior on the CPU, and some states on the way to each."""

    x_0: Tensor  # (n, *)
    steps: Tensor  # (n, K), the numbers of the steps that begin at the states
    states: Tensor  # (n, K, *)
    x_hat: Tensor  # (n, K, *), the prior's x̂ at the states


def default_batch(denoiser: Denoiser) -> int:
    """Return how many paths to simulate together: 256, or fewer of many dimensions."""
    return min(256, max(8, 2**18 // math.prod(denoiser.shape)))


@torch.no_grad()
def paths(
    denoiser: Denoiser, n: int, times: Times, generator: Generators, cond: dict[str, Tensor] | None = None,
    labels: dict[str, Tensor] | None = None, strength: float = 1.0, compare: bool = False, eta: float = 1.0,
    batch: int | None = None, progress: Callable[[int], None] | None = None, gamma: float | Tensor | None = None,
) -> Paths:  # fmt: skip
    """Simulate n paths in batches, without a graph; ranks share the batches, and each returns all paths.

    Args:
        denoiser: prior or policy.
        times: the chain's grid.
        generator: of all noise, or one for each path.
        cond, labels: n rows each.
        strength: w of the control.
        compare: also measure the path's KL against the prior.
        eta: churn.
        batch: paths at a time; None for 256, or fewer of many dimensions.
        progress: called with the number of paths done since the last call.
        gamma: γ of the control, a number or (n,); None for the policy's own.
    """

    def simulate(rows: slice, noise: list[Tensor]) -> tuple[Tensor, ...]:
        control: dict[str, Any] = {"labels": rows_of(labels, rows), "strength": strength} if labels else {}
        if labels and gamma is not None:
            control["gamma"] = gamma[rows] if isinstance(gamma, Tensor) and gamma.ndim else gamma
        options = {"compare": compare, "cond": rows_of(cond or {}, rows), "noise": noise[1:], **control}
        with denoiser.frozen():
            path = rollout(denoiser, noise[0], times, eta, **options)
        zeros = torch.zeros(len(path.end))
        kl, log_ratio = (zeros if each is None else each.sum(0).cpu() for each in (path.kl, path.log_ratio))
        return path.end.cpu(), kl, log_ratio

    return Paths(*in_batches(denoiser, n, len(times), generator, simulate, batch, progress, len(Paths._fields)))


@torch.no_grad()
def paths_with_states(
    prior: Denoiser, steps: Tensor, times: Times, generator: torch.Generator, cond: dict[str, Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> PriorPaths:  # fmt: skip
    """Simulate n paths of the prior as `paths` does; keep states at which steps (n, K) of each begin, with their x̂."""

    def simulate(rows: slice, noise: list[Tensor]) -> tuple[Tensor, ...]:
        row_cond = rows_of({name: value.to(noise[0].device) for name, value in (cond or {}).items()}, rows)
        states, x_hats = zip(*denoised(prior, noise, times, row_cond), strict=True)
        index = steps[rows], torch.arange(len(noise[0]))[:, None]
        return x_hats[-1].cpu(), torch.stack(states)[index].cpu(), torch.stack(x_hats)[index].cpu()

    x_0, states, x_hat = in_batches(prior, len(steps), len(times), generator, simulate, None, progress, 3)
    return PriorPaths(x_0, steps, states, x_hat)


def denoised(
    prior: Denoiser, noise: Iterable[Tensor], times: Times, cond: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x_t and x̂ (n, *) of the prior's paths at each of the times; the last x̂ is the read-out x_0.

    `noise` is what the paths begin with, and then that of each step (n, *).
    """
    each = iter(noise)
    x_t = next(each)
    for t, s in pairwise(times):
        x_hat = prior(x_t, t, **cond)
        yield x_t, x_hat
        x_t = step(prior.schedule, x_hat, x_t, t, s, 1.0).rsample(next(each))
    yield x_t, read_out(prior, x_t, times[-1], **cond)


def in_batches(
    denoiser: Denoiser, n: int, count: int, generator: Generators,
    simulate: Callable[[slice, list[Tensor]], tuple[Tensor, ...]], batch: int | None,
    progress: Callable[[int], None] | None, results: int,
) -> list[Tensor]:  # fmt: skip
    """Call `simulate` with the rows of each batch of n paths and its `count` tensors of noise; ranks share the batches.

    Return each of its `results`, which a rank without a batch cannot count, for all n paths on every rank.
    """
    batches = parts(n, batch or default_batch(denoiser))
    lists: list[list[Tensor]] = [[] for _ in range(results)]
    rank_batches = batches[ranks.rank_slice(len(batches))]
    for rows in batches:
        shape = (rows.stop - rows.start, *denoiser.shape)
        # the noise of other ranks' batches is drawn, too, but not moved
        source, kept = generators_of(generator, rows), EVERY if rows in rank_batches else slice(0)
        noise = [normal(shape, denoiser, source, kept) for _ in range(count)]
        if rows in rank_batches:
            for values, value in zip(lists, simulate(rows, noise), strict=True):
                values.append(value)
        if progress:
            progress(shape[0])
    if ranks.sharded() and len(rank_batches) * ranks.world_size() < len(batches):  # other ranks have one batch more
        simulate(slice(0, 1), [torch.zeros(1, *denoiser.shape, device=denoiser.device) for _ in range(count)])
    return [ranks.all_gather(torch.cat(values) if values else torch.empty(0)) for values in lists]
