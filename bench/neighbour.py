"""Measure an update of `adjoint` on the digits alone and beside a busy process: bench/results/neighbour.json.

python bench/neighbour.py [ROUNDS]      (one to six minutes a round, on two cores)

The neighbour keeps every core busy. A worker is one process of its own: with the threads that `ctrl` sets before torch
is loaded, or with torch's own. Ratios are of medians over the updates of all rounds; a worker that has not ended after
LIMIT seconds counts as one update of that length, a lower bound.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from evidence import write

from ctrl_diffusion.system.launch import SPINNING, set_threads

UPDATES, LONG = 4, 15.0  # of a worker; none begins after so many seconds
LIMIT = 240.0  # seconds of a whole worker, with its imports
THREADS, PLACES = ("ours", "torch's own"), ("alone", "beside")
CORES = os.cpu_count() or 1


def worker(threads: str) -> list[float]:
    """Return the seconds of each update, with the threads that a command sets or that torch has."""
    if threads == "ours":
        set_threads()
    import torch

    from ctrl_diffusion.control.conditions import Conditions
    from ctrl_diffusion.control.lora import LoRAControl
    from ctrl_diffusion.control.policy import Policy
    from ctrl_diffusion.learn.adjoint import Adjoint
    from ctrl_diffusion.learn.fit import fit
    from ctrl_diffusion.prior.prior import open_prior
    from ctrl_diffusion.reward.reward import Reward
    from ctrl_diffusion.reward.scorer import Classifier

    torch.manual_seed(0)
    prior = open_prior("digits")
    policy = Policy(prior.denoiser, LoRAControl("y", "0123", prior.denoiser))
    reward = Reward({"y": Classifier(1, 4).eval().requires_grad_(False)})
    learner = Adjoint(prior.denoiser.times(20, 0.05), 160, reuse=1)  # as on the demo, new paths for every update
    conditions = Conditions.for_training({"c": torch.arange(10)}, {"y": 4})
    stream = learner(policy, reward, conditions, torch.Generator().manual_seed(0))
    updates, seconds, begin = fit(policy, stream, UPDATES, {"embedding": 1e-3, "adapter": 1e-3}), [], time.monotonic()
    while len(seconds) < UPDATES and time.monotonic() - begin < LONG:
        start = time.perf_counter()
        next(updates)
        seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def neighbour(place: str) -> Iterator[None]:
    """Keep every core busy inside, if anybody is beside."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # ends with this process, however that ends
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(CORES * (place == "beside"))]
    try:
        yield
    finally:
        for each in loops:
            each.kill()
            each.wait()


def measured(threads: str) -> list[float]:
    """Run a worker in a process whose environment says nothing of threads."""
    clean = {name: value for name, value in os.environ.items() if name not in {*SPINNING, "OMP_NUM_THREADS"}}
    command = [sys.executable, __file__, "--worker", threads]
    try:
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return [LIMIT]
    return json.loads(done.stdout)


def main(rounds: int) -> None:
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for place in PLACES:
            for threads in THREADS:
                with neighbour(place):
                    updates = measured(threads)
                seconds.setdefault((threads, place), []).extend(updates)
                print(f"{threads}, {place}: {', '.join(f'{each:.2f}' for each in updates)} s", flush=True)
    report(seconds, rounds)


def report(seconds: dict[tuple[str, str], list[float]], rounds: int) -> None:
    median = {key: statistics.median(values) for key, values in seconds.items()}
    rows = [
        {
            "threads": threads, "alone": median[threads, "alone"], "beside": median[threads, "beside"],
            "ratio": median[threads, "beside"] / median[threads, "alone"],
            "updates": [len(seconds[threads, place]) for place in PLACES],
        }
        for threads in THREADS
    ]  # fmt: skip
    print(f"{'threads':<14}{'alone, s':>10}{'beside, s':>11}{'ratio':>8}")
    for row in rows:
        print(f"{row['threads']:<14}{row['alone']:>10.2f}{row['beside']:>11.2f}{row['ratio']:>8.1f}")
    write("neighbour", {"cores": CORES, "load": os.getloadavg(), "rounds": rounds, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(sys.argv[2])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
