"""Say, before torch is imported, who started this process: whether it is one of several, and on how many cores.

A platform (Kubernetes, SageMaker, Slurm) describes its nodes in variables that torch and accelerate take for the order
to meet other processes. Only who starts one process for each rank also numbers them on their host: without that number
this process runs alone, whatever else is set.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from .machine import cores, quota

STANDARD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# rank, size, rank on this host, size on this host: the variables that accelerate looks for, launcher by launcher
LAUNCHERS = {
    "": STANDARD,  # torchrun, accelerate and whatever follows them
    "Open MPI's mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH's mpirun": tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpirun": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    "srun --mpi=pmi2": ("PMI_RANK", "PMI_SIZE", "SLURM_LOCALID", "LOCAL_WORLD_SIZE"),
}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # where, unless said: on one host, at torch's port
PLATFORM = (*dict.fromkeys(size for _, size, *_ in LAUNCHERS.values()), "SLURM_NTASKS")
# OpenMP's threads wait in a busy loop for the next parallel region, and keep a neighbour, or each other, from the core
PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}  # of libgomp, and of Intel's and LLVM's libraries
SPINNING = {*PASSIVE, "GOMP_SPINCOUNT"}  # by any of these a user decides


class Launch(NamedTuple):
    """Hold the place of this process among those that were started with it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # on this host
    by: str = ""  # who started them; nobody where it is alone


def launcher(environment: Mapping[str, str]) -> str | None:
    """Return the row of LAUNCHERS that numbered this process on its host; None if it was started alone."""
    numbered = (by for by, (rank, _, local, _) in LAUNCHERS.items() if {rank, local} <= set(environment))
    by = next(numbered, None)
    return None if by == "" and environment["LOCAL_RANK"] == "-1" else by  # as old scripts say "not distributed"


def rank_of(environment: Mapping[str, str]) -> str:
    """Return the rank of this process as the launcher wrote it, "0" if it is alone."""
    by = launcher(environment)
    return "0" if by is None else environment[LAUNCHERS[by][0]]


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read the place of this process; raise ValueError for numbers that are none, or do not fit each other."""
    if (by := launcher(environment)) is None:
        return Launch()
    values = {name: environment[name] for name in LAUNCHERS[by] if name in environment}
    try:
        rank, size, local_rank, local_size = (int(values.get(name, "1")) for name in LAUNCHERS[by])
    except ValueError:
        rank, size, local_rank, local_size = 0, 0, 0, 0
    if not (0 <= rank < size and local_rank >= 0 and local_size >= 1):
        what = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ValueError(f"{what}: these number no process among several. Unset them, or use accelerate launch.")
    if not by:
        accelerate = any(name.startswith("ACCELERATE_") for name in environment)
        torchrun = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the launcher that set LOCAL_RANK"
        by = "accelerate launch" if accelerate else torchrun
    return Launch(rank, size, local_rank, local_size, by)


def ignored(environment: Mapping[str, str]) -> list[str]:
    """List the variables, NAME=VALUE, that speak of several processes although nobody started any."""
    if launcher(environment) is not None:
        return []
    return [f"{name}={environment[name]}" for name in PLATFORM if environment.get(name, "1") not in ("1", "")]


@contextmanager
def standard_environment(launch: Launch) -> Iterator[None]:
    """Describe a launch of several inside by torch's own variables alone; a process that is alone by none."""
    names = {name for row in LAUNCHERS.values() for name in row} | set(MEETING)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    if launch.size > 1:
        meeting = MEETING | {name: value for name, value in before.items() if name in MEETING}
        if "MASTER_ADDR" not in before and launch.local_size < launch.size:
            hosts = f"{launch.size} processes on several hosts"
            raise ValueError(f"{hosts}: MASTER_ADDR is not set. Export it: the name of the host of process 0.")
        os.environ.update(meeting | dict(zip(STANDARD, map(str, launch[:4]), strict=True)))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def thread_count(local_size: int, granted: float | None) -> int | None:
    """Return how many threads a process has cores for; None where OpenMP's own count, by affinity, is right."""
    affinity = cores()
    count = max(1, int(min(affinity, affinity if granted is None else granted)) // local_size)
    return count if count < affinity else None


def set_threads() -> None:
    """Let threads wait without a busy loop, and be no more than cores; only for a command, and before torch is there.

    Whatever the user has set stays. OpenMP reads these once, when it is loaded.
    """
    if "torch" in sys.modules:
        return
    if not SPINNING & set(os.environ):
        os.environ.update(PASSIVE)
    try:
        local_size = read_launch(os.environ).local_size
    except ValueError:  # is refused as soon as the command runs
        local_size = 1
    if "OMP_NUM_THREADS" not in os.environ and (count := thread_count(local_size, quota())):
        os.environ["OMP_NUM_THREADS"] = str(count)  # OpenBLAS and MKL follow it, unless they have their own
