"""Share one job among several processes (ranks), as accelerate starts them; with one process everything is a no-op.

Every rank draws the random numbers of the whole batch from the same stream and runs the network on its own rows. A draw
therefore depends on seed, step and the sample's index in the whole batch, not on the number of ranks. A loss is a sum
over rows divided by the size of the whole batch, so the ranks' gradients sum to that of the batch, as with
DistributedDataParallel. Its wrapper expects one forward pass before each backward pass, and a chain makes many.

The prior's weights may be sharded (`prior.sharding`) if accelerate is launched with FSDP. A block's are then gathered
from all ranks for every pass, so every rank must call the network equally often. Work that must happen once (fit,
decide, write) is done by rank 0 and its result, or its error, is broadcast.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, reduce
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from .launch import Launch, ignored, read_launch, standard_environment
from .rendezvous import meet

T = TypeVar("T")
TIMEOUT = timedelta(hours=12)  # rank 0 may fit or write for long; a process that dies is noticed at once
FSDP = "ACCELERATE_USE_FSDP"
_alone = _sharded = False


def state() -> PartialState:
    """Return accelerate's state of this process, on a CPU without CUDA; the first call meets the other ranks.

    Raises:
        ValueError: a model is to be sharded other than by FSDP2; the other ranks have not come.
    """
    global _sharded
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("a model is not sharded by DeepSpeed here. Launch with --use_fsdp --fsdp_version 2.")
    if parse_flag_from_env(FSDP):
        if os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("a model is sharded by FSDP2 here. Launch with --use_fsdp --fsdp_version 2.")
        # else accelerate would shard the control as if it were the model, and transformers would load no weights
        _sharded, os.environ[FSDP] = True, "false"
    return PartialState() if PartialState._shared_state else first_state(read_launch(os.environ))


def first_state(launch: Launch) -> PartialState:
    """Make accelerate's state: of a process that is alone, whatever a platform says, or once all ranks are there."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if others := ", ".join(ignored(os.environ)):
        advice = "Use accelerate launch or torchrun for several."
        alone = f"{others}: ignored, this process works alone, since no launcher started it"
        warnings.warn(f"{alone}. {advice}", stacklevel=2)
    with standard_environment(launch):
        if launch.size == 1:
            return PartialState(cpu=cpu)
        store = meet(launch)
        place = {"store": store, "rank": launch.rank, "world_size": launch.size}
        shared = PartialState(cpu=cpu, timeout=store.timeout, **place)  # to connect takes no longer than to meet
    store.set_timeout(TIMEOUT)
    _set_pg_timeout(TIMEOUT)
    return shared


def world_size() -> int:
    """Return the number of ranks that share the work."""
    return 1 if _alone else state().num_processes


def sharded() -> bool:
    """Return whether each rank holds a shard of the prior's weights, so that all must call its network in step."""
    return world_size() > 1 and _sharded


def is_main() -> bool:
    """Return whether this is rank 0, which writes files and talks to the user."""
    return bool(state().is_main_process)


@contextmanager
def alone() -> Iterator[None]:
    """Act as the only process inside: no collective call waits for other ranks."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def main_warns() -> Iterator[None]:
    """Silence warnings inside on every rank but 0."""
    with warnings.catch_warnings():
        if not is_main():
            warnings.simplefilter("ignore")
        yield


def rank_slice(n: int) -> slice:
    """Return this rank's contiguous part of n items; the first ranks take the remainder."""
    rank, size = 0 if _alone else state().process_index, world_size()
    return slice(-(-n * rank // size), -(-n * (rank + 1) // size))


def rank_rows(n: int) -> slice:
    """Return this rank's rows of a batch of n; refuse a batch too small, or with sharded weights unequal shares."""
    size = world_size()
    if n < size:
        raise ValueError(f"a batch of {n} cannot be shared by {size} processes. Raise batch, or launch fewer.")
    if sharded() and n % size:
        raise ValueError(f"sharded weights: batch must be a multiple of the {size} processes, got {n}.")
    return rank_slice(n)


def gather_lists(values: list[Tensor]) -> list[Tensor]:
    """Concatenate the lists of all ranks, which may differ in length, on the CPU."""
    return values if world_size() == 1 else gather_object([value.cpu() for value in values])


def all_gather(rows: Tensor, dim: int = 0) -> Tensor:
    """Concatenate the tensors of all ranks in order of rank; an empty one may have any shape."""
    if world_size() == 1:
        return rows
    return torch.cat([part for part in gather_lists([rows]) if part.numel()], dim).to(rows.device)


def broadcast(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 alone and return its result, on the CPU, or raise its error on every rank."""
    if world_size() == 1:
        return make()
    result: list[Any] = [None, None]
    if is_main():
        try:
            with alone():
                result[0] = make()
        except Exception as error:
            result[1] = error
    broadcast_object_list(result)
    state().wait_for_everyone()
    if result[1] is not None:
        raise result[1]
    return cast(T, result[0])


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank where ranks call the network in step, else this rank's flag."""
    return bool(all_reduce(torch.tensor(float(flag)))) if sharded() else flag


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks; the result is on the tensor's device."""
    return tensor if world_size() == 1 else reduce(tensor.to(state().device), "sum").to(tensor.device)


def all_reduce_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Sum metrics over ranks, which must all have the same keys in the same order."""
    if world_size() == 1:
        return metrics
    sums = all_reduce(torch.tensor(list(metrics.values()), dtype=torch.float64))
    return dict(zip(metrics, sums.tolist(), strict=True))


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over ranks in one message; a parameter without a gradient on any rank keeps None."""
    if world_size() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    counts = gradients[0].new_tensor([p.grad is not None for p in parameters])
    flat = [gradient.flatten() for gradient in (*gradients, counts)]
    *sums, counts = all_reduce(torch.cat(flat)).split([len(part) for part in flat])
    for p, total, count in zip(parameters, sums, counts.tolist(), strict=True):
        p.grad = total.view_as(p) if count else None


def reshard(network: nn.Module) -> None:
    """Free the gathered weights of a sharded network, which FSDP keeps where a step is recomputed on the way back."""
    for module in network.modules() if sharded() else ():
        if callable(free := getattr(module, "reshard", None)):
            free()
