"""One job on several processes (ranks), as accelerate starts them; of one process nothing here asks anything.

Every rank draws the random numbers of the whole batch from the same stream and runs the network on its own rows. So a
draw is keyed by seed, step and the sample's place in the whole batch, and knows nothing of the number of ranks. A loss
is a sum over rows divided by their whole number; the sum of the ranks' gradients is therefore that of the batch. This
is what DistributedDataParallel computes. Its wrapper is not used: it wants one forward pass before each backward pass,
where a chain makes many, and what is trained is small enough for one sum.

The prior's own weights may be sharded (`shard`): as accelerate asks for it by FSDP. A block's weights are then gathered
from all ranks whenever it is called, forward and back, and every rank must call the network as often as the others.

What only one may do (fit, decide, write) rank 0 does, and the others are given what came of it, an error included.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, reduce
from torch import Tensor, nn

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # while rank 0 fits or writes; a process that dies is noticed at once
FSDP = "ACCELERATE_USE_FSDP"
_alone = _sharded = False


def state() -> PartialState:
    """What accelerate knows of this process; without CUDA ranks talk as CPUs do.

    Raises:
        ValueError: it was launched to shard the model in another way than by FSDP2.
    """
    global _sharded
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("a model is not sharded by DeepSpeed here. Launch with --use_fsdp --fsdp_version 2.")
    if parse_flag_from_env(FSDP):
        if os.environ.get("FSDP_VERSION") != "2":
            raise ValueError("a model is sharded by FSDP2 here. Launch with --use_fsdp --fsdp_version 2.")
        # or accelerate would prepare what is trained as if it were the model, and transformers load no weights
        _sharded, os.environ[FSDP] = True, "false"
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def count() -> int:
    """How many ranks share the work."""
    return 1 if _alone else state().num_processes


def sharded() -> bool:
    """Whether the ranks each have a part of the prior's weights, and so call its network in step."""
    return count() > 1 and _sharded


def is_first() -> bool:
    """Whether this is the rank that writes, and talks to the user."""
    return state().is_main_process


@contextmanager
def alone() -> Iterator[None]:
    """Inside, nothing is shared with the other ranks, which need not come here."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def first_speaks() -> Iterator[None]:
    """Inside, only rank 0 warns."""
    with warnings.catch_warnings():
        if not is_first():
            warnings.simplefilter("ignore")
        yield


def share(n: int) -> slice:
    """This rank's of n things in a row; what is left over falls to the first ranks."""
    rank = 0 if _alone else state().process_index
    return slice(-(-n * rank // count()), -(-n * (rank + 1) // count()))


def share_of_batch(n: int) -> slice:
    """This rank's rows of a batch of n.

    Raises:
        ValueError: some rank would have none; or not as many as the others, where these must go in step.
    """
    if n < count():
        raise ValueError(f"a batch of {n} cannot be shared by {count()} processes. Raise batch, or launch fewer.")
    if sharded() and n % count():
        raise ValueError(f"sharded weights: batch must be a multiple of the {count()} processes, got {n}.")
    return share(n)


def joined(mine: list[Tensor]) -> list[Tensor]:
    """The lists of all ranks, which may be of different lengths, as one."""
    return mine if count() == 1 else gather_object([value.cpu() for value in mine])


def gathered(mine: Tensor, dim: int = 0) -> Tensor:
    """The shares of all ranks, one after the other; a share may be empty, of any shape."""
    if count() == 1:
        return mine
    return torch.cat([share for share in joined([mine]) if share.numel()], dim).to(mine.device)


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, alone, for every rank; what it makes is to be on the CPU. An error of it is everybody's."""
    if count() == 1:
        return make()
    answer: list = [None, None]
    if is_first():
        try:
            with alone():
                answer[0] = make()
        except Exception as error:
            answer[1] = error
    broadcast_object_list(answer)
    state().wait_for_everyone()
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def any_of(mine: bool) -> bool:
    """Whether it is so on any of the ranks that go in step; on this one if they do not."""
    return bool(summed(torch.tensor(float(mine)))) if sharded() else mine


def summed(mine: Tensor) -> Tensor:
    """The sum over ranks of a tensor, where it is."""
    return mine if count() == 1 else reduce(mine.to(state().device), "sum").to(mine.device)


def sum_figures(figures: dict[str, float]) -> dict[str, float]:
    """The sum over ranks of figures that all of them have, in the same order."""
    if count() == 1:
        return figures
    whole = summed(torch.tensor(list(figures.values()), dtype=torch.float64))
    return dict(zip(figures, whole.tolist(), strict=True))


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients, in one message; a parameter that none has one of keeps none."""
    if count() == 1:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = own[0].new_tensor([p.grad is not None for p in parameters])
    flat = [gradient.flatten() for gradient in (*own, there)]
    *sums, there = summed(torch.cat(flat)).split([len(part) for part in flat])
    for p, whole, ranks in zip(parameters, sums, there.tolist(), strict=True):
        p.grad = whole.view_as(p) if ranks else None


def reshard(network: nn.Module) -> None:
    """Drop what is gathered of a sharded network; FSDP does not where a step is computed again on the way back."""
    for module in network.modules() if sharded() else ():
        if hasattr(module, "reshard"):
            module.reshard()
