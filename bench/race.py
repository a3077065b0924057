"""Time the contenders of bench/speed.py and measure their memory.

A contender is a process in an environment of its own. It runs an update for each line on its input and answers with
the CPU seconds: of one thread beside other jobs these are what the wall clock would show on a quiet machine. Its memory
is its peak above what it held before its first update.
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
    """Score four classes of the mean pixel: a reward that costs next to nothing."""

    def __init__(self, latent: bool = False) -> None:
        self.latent = latent

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(y | x) (B, 4) in nats."""
        mean = x.flatten(1).mean(1, keepdim=True)
        return (-4 * (mean - torch.linspace(-0.5, 0.5, CLASSES, device=x.device)).square()).log_softmax(1)


def resident(peak: bool = False) -> float:
    """Return the megabytes this process holds, or its peak since the last reset."""
    name = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def keep(name: str, figures: dict[str, Any]) -> None:
    """Put figures into bench/results/speed.json, beside those of other parts."""
    evidence.write("speed", {**evidence.read("speed", {}), name: figures})


def serve(update: Callable[[], object]) -> None:
    """Run an update for each line of standard input and answer with its seconds and the peak memory."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print too
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins here
    before = resident()
    answers.write("ready\n")
    for _ in sys.stdin:
        begin = time.process_time()
        update()
        answers.write(json.dumps([time.process_time() - begin, resident(peak=True) - before]) + "\n")


def ranked(processes: int) -> Iterator[dict[str, str]]:
    """Yield the environment variables that accelerate reads, for each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(processes):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        size = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        yield {name: str(value) for name, value in (where | size).items()} if processes > 1 else {}


class Contender:
    """Start a contender.

    Args:
        command: starts its process.
        processes: number of processes that share its updates.
    """

    def __init__(self, *command: str | int | Path, processes: int = 1) -> None:
        # allocations of a megabyte go back when they are freed: the peak is what is held, not what was ever allocated
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        parts = [str(part) for part in command]
        self.processes = [
            subprocess.Popen(parts, text=True, bufsize=1, env=environment | rank, **pipes) for rank in ranked(processes)
        ]
        self.seconds: list[float] = []
        self.megabytes = 0.0
        if any(process.stdout.readline() != "ready\n" for process in self.processes):
            raise RuntimeError(f"{' '.join(parts)} did not start.")

    def update(self) -> None:
        """Run an update and keep its seconds; of several processes the slowest's."""
        for process in self.processes:
            process.stdin.write("\n")
        answers = [json.loads(process.stdout.readline()) for process in self.processes]
        seconds, self.megabytes = map(max, zip(*answers, strict=True))
        self.seconds.append(seconds)

    def stop(self) -> None:
        """Stop its processes."""
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait()


@contextmanager
def raced(
    contenders: dict[str, Command], rounds: int, processes: dict[str, int] | None = None
) -> Iterator[dict[str, Contender]]:
    """Yield contenders after an uncounted round and `rounds` rounds, in each of which they take turns.

    Args:
        contenders: the command of each.
        rounds: number of counted rounds.
        processes: number of processes of those that have several.
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
