"""What every contender of bench/speed.py shares: the reward, and how one is started, timed, weighed and written down.

A contender is a process of its own, in whatever environment it needs. It runs an update for each line it is given and
answers with the CPU seconds that took: of one thread beside other jobs these are what the wall clock would say on a
quiet machine. Its memory is the peak of what it holds above what it held before its first update.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import evidence
import torch
from torch import Tensor

Command = tuple[str | int | Path, ...]
PROMPTS = ("a cat", "a dog")
GUIDANCE = 5.0
RANK = 16
CLASSES = 4


class Brightness:
    """log p(y | x) of four classes of the mean pixel: a reward that costs next to nothing."""

    def __init__(self, latent: bool = False) -> None:
        self.latent = latent

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, 4) in nats."""
        mean = x.flatten(1).mean(1, keepdim=True)
        return (-4 * (mean - torch.linspace(-0.5, 0.5, CLASSES, device=x.device)).square()).log_softmax(1)


def resident(peak: bool = False) -> float:
    """Megabytes this process holds, or the most it held since the last reset."""
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def keep(name: str, figures: dict[str, Any]) -> None:
    """Put figures into bench/results/speed.json, beside what others wrote there meanwhile."""
    evidence.write("speed", {**evidence.read("speed", {}), name: figures})


def serve(update: Callable[[], object]) -> None:
    """Be a contender."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
    before = resident()
    answers.write("ready\n")
    for _ in sys.stdin:
        begin = time.process_time()
        update()
        answers.write(json.dumps([time.process_time() - begin, resident(peak=True) - before]) + "\n")


def ranked(processes: int) -> Iterator[dict[str, str]]:
    """What accelerate reads of itself in each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(processes):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        size = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        yield {name: str(value) for name, value in (where | size).items()} if processes > 1 else {}


class Contender:
    """One that was started.

    Args:
        command: of its process.
        processes: that share its updates.
    """

    def __init__(self, *command: str | int | Path, processes: int = 1) -> None:
        # allocations of a megabyte go back when they are freed: the peak is what is held, not what was ever asked for
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        parts = [str(part) for part in command]
        self.processes = [
            subprocess.Popen(parts, text=True, bufsize=1, env=environment | own, **pipes) for own in ranked(processes)
        ]
        self.seconds: list[float] = []
        self.megabytes = 0.0
        if any(process.stdout.readline() != "ready\n" for process in self.processes):
            raise RuntimeError(f"{' '.join(parts)} did not start.")

    def update(self) -> None:
        """Have it run one, and keep what it took; of several processes the one that took the most."""
        for process in self.processes:
            process.stdin.write("\n")
        answers = [json.loads(process.stdout.readline()) for process in self.processes]
        seconds, self.megabytes = map(max, zip(*answers, strict=True))
        self.seconds.append(seconds)

    def stop(self) -> None:
        """It is not needed any more."""
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait()


@contextmanager
def raced(
    contenders: dict[str, Command], rounds: int, processes: dict[str, int] | None = None
) -> Iterator[dict[str, Contender]]:
    """Contenders after a round that is not counted and `rounds` in which each ran one update after the other.

    Args:
        contenders: how each is started.
        rounds: how many.
        processes: of those that have more than one.
    """
    started: dict[str, Contender] = {}
    try:
        for name, command in contenders.items():
            started[name] = Contender(*command, processes=(processes or {}).get(name, 1))
        for _ in range(rounds + 1):
            for contender in started.values():
                contender.update()
        for contender in started.values():
            del contender.seconds[0]
        yield started
    finally:
        for contender in started.values():
            contender.stop()
