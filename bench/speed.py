"""Measure where the time of an update goes, and the time of others: docs/why/performance.md, bench/results/speed.json.

python bench/speed.py                    (half an hour on one quiet thread; makes the peer's environment the first time)
python bench/speed.py share_of_limit|vs_reference|vs_trl|vs_before|growth|processes|time_to_gap|traces|options …
python bench/speed.py contender FOLDER LEARNER BATCH STEPS MICRO CONTROLS        (run one, see bench/race.py)

A Stable Diffusion of 100,000 parameters under guidance, its weights random, saved and loaded by diffusers. Seconds are
CPU seconds of one thread; every figure is a median over interleaved rounds, quoted as a ratio.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from race import CLASSES, Command, Contender, keep, raced, serve
from setting import Setting, evaluations, write_tiny

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.evaluate.certificate import certify
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.reward import Reward, prior_table
from ctrl_diffusion.system.files import rounded

HERE = Path(__file__).parent
PEER = HERE.parent / "runs" / "peer"
BEFORE = "d456200"  # the commit before its steps were measured
BEFORE_BENCH = "0d18236"  # the last commit whose bench/speed.py runs on it
PEER_PACKAGES = ("torch==2.13.0", "trl==0.22.2", "diffusers==0.35.2", "transformers<5", "peft")
BATCH, STEPS, ROUNDS = 8, 10, 9
GAP_UPDATES, GAP_EVERY = 400, 10
DRAWN = ("sampling", "prior's sampling")
LEARNERS = ("weighted", "adjoint", "lean", "backprop", "ppo")


@contextmanager
def bare(setting: Setting, kind: str, batch: int) -> Iterator[Callable[[], None]]:
    """Yield a function that evaluates the bare network once, for a batch of samples under guidance."""
    network, policy = setting.prior.denoiser.network, setting.policy
    control = policy.controls["y0"]
    who, _, to = kind.partition(" ")
    x_t = torch.randn(2 * batch, *policy.shape)
    timestep, y = torch.full((2 * batch,), 500.0), torch.arange(batch) % CLASSES
    rows = torch.cat(
        [value[torch.zeros(batch, dtype=torch.long)] for value in setting.prior.denoiser.call.rows.values()]
    )
    rows, gradient = rows.repeat(2, 1, 1), torch.ones_like(x_t)

    def run() -> None:
        with torch.set_grad_enabled(bool(to)), control.active(y) if "θ" in to else ExitStack():
            x = x_t.detach().requires_grad_("x" in to)
            prediction = network(x, timestep, rows, return_dict=False)[0]
        if to:
            inputs = ([x] if "x" in to else []) + (policy.trainable() if "θ" in to else [])
            torch.autograd.grad(prediction, inputs, gradient)

    with ExitStack() as stack:
        if who == "policy" and "θ" not in to:  # W + BA are in place
            stack.enter_context(policy.frozen())
            stack.enter_context(control.active(y))
        yield run


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Return the mean CPU seconds of a run."""
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - begin) / repeats


def share(folder: Path) -> dict[str, float]:
    """Return the time of the evaluations alone over that of an update, for sampling and every learner."""
    setting = Setting.from_folder(folder, STEPS, latent=True)
    with torch.no_grad():
        for p in setting.policy.trainable():  # zeros are quicker than what is trained
            p.add_(0.01 * torch.randn(p.shape))
    ratios: dict[str, list[float]] = {name: [] for name in [*DRAWN, *LEARNERS, "policy / prior"]}
    runs = {name: setting.run(name, batch_of(name)) for name in [*DRAWN, *LEARNERS]}

    def alone(name: str) -> float:
        """Time the evaluations of one update, each kind anew."""
        total = 0.0
        for (kind, batches), n in evaluations(name, STEPS).items():
            with bare(setting, kind, batches * batch_of(name)) as evaluate:
                total += n * seconds(evaluate, 2)
        return total

    for i in range(ROUNDS + 1):
        times = {}
        for name, run in runs.items():
            before = alone(name)
            times[name] = seconds(run)
            if i:  # the first round is not counted
                ratios[name].append((before + alone(name)) / 2 / times[name])
        if i:
            ratios["policy / prior"].append(times["sampling"] / times["prior's sampling"])
    return {name: statistics.median(values) for name, values in ratios.items()}


def batch_of(name: str) -> int:
    """Return the number of paths, or samples of the cache, in an update."""
    return 8 * BATCH if name == "weighted" else BATCH


def ours(folder: Path, learner: str, batch: int, steps: int, micro: int = 0, controls: int = 1) -> Command:
    """Return the command of a contender of our own."""
    return sys.executable, __file__, "contender", folder, learner, batch, steps, micro, controls


def reference(folder: Path, batch: int, steps: int) -> Command:
    """Return the command of the reference schedule on our own grid."""
    times = Prior.from_pretrained(folder).denoiser.times(steps, 0.05, 2.0)
    return sys.executable, HERE / "reference.py", folder, batch, ",".join(map(str, times))


def peer(folder: Path, trainer: str, batch: int, steps: int) -> Command:
    """Return the command of a trainer of trl in its own environment, made if there is none."""
    python = PEER / "bin" / "python"
    if not (PEER / "ready").exists():
        venv.create(PEER, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True)
        (PEER / "ready").touch()
    return python, HERE / "peer.py", folder, trainer, batch, steps


def ratio(first: Contender, second: Contender) -> float:
    """Return the ratio of the times of an update, the median over rounds."""
    return statistics.median(a / b for a, b in zip(first.seconds, second.seconds, strict=True))


def against_reference(folder: Path) -> dict[str, Any]:
    """Compare with the reference schedule of the same loss, at once and on more paths in parts."""
    figures: dict[str, Any] = {}
    for batch, micro in ((BATCH, 0), (4 * BATCH, 0), (4 * BATCH, 2 * BATCH)):
        commands = {"ours": ours(folder, "backprop", batch, STEPS, micro), "reference": reference(folder, batch, STEPS)}
        with raced(commands, ROUNDS if batch == BATCH else 5) as run:
            first, second = run["ours"], run["reference"]
            row: dict[str, Any] = {"time_ratio": ratio(first, second)}
            row["memory_ratio"] = first.megabytes / second.megabytes
            row["megabytes"] = [first.megabytes, second.megabytes]
        figures |= row if batch == BATCH else {f"{batch} paths" + (f" in parts of {micro}" if micro else ""): row}
    return figures


def against_trl(folder: Path) -> dict[str, Any]:
    """Compare `backprop` with AlignProp through all steps, and `ppo` with DDPO on all steps."""
    commands = {
        "backprop": ours(folder, "backprop", BATCH, STEPS), "alignprop": peer(folder, "alignprop", BATCH, STEPS),
        "ppo": ours(folder, "ppo", BATCH, STEPS), "ddpo": peer(folder, "ddpo", BATCH, STEPS),
    }  # fmt: skip
    with raced(commands, ROUNDS) as run:
        pairs = {"backprop": "alignprop", "ppo": "ddpo"}
        updates = {name: ratio(run[name], run[other]) for name, other in pairs.items()}
        memory = {name: run[name].megabytes / run[other].megabytes for name, other in pairs.items()}
    # ours: policy and prior, forward and back; theirs: the policy, without a KL
    evaluations_ratio = 2.0
    return {
        "time_ratio": updates["backprop"] / evaluations_ratio, "memory_ratio": memory["backprop"],
        "update_ratio": updates["backprop"], "ddpo": {"update_ratio": updates["ppo"], "memory_ratio": memory["ppo"]},
    }  # fmt: skip


def against_before(folder: Path) -> dict[str, Any]:
    """Compare this library with an earlier commit of itself."""
    with TemporaryDirectory() as before:
        for commit, parts in ((BEFORE, ["src"]), (BEFORE_BENCH, ["bench", "tests"])):
            archive = subprocess.run(
                ["git", "archive", commit, *parts], cwd=HERE.parent, check=True, capture_output=True
            )
            subprocess.run(["tar", "-x", "-C", before], input=archive.stdout, check=True)
        commands: dict[str, Command] = {}
        for name in (DRAWN[0], *LEARNERS):
            python, script, *arguments = ours(folder, name, batch_of(name), STEPS)
            old = ("env", f"PYTHONPATH={before}/src", python, f"{before}/bench/speed.py", *arguments)
            commands |= {name: (python, script, *arguments), f"{name} before": old}
        with raced(commands, ROUNDS) as run:
            pairs = {name: (run[name], run[f"{name} before"]) for name in (DRAWN[0], *LEARNERS)}
            return {
                name: {"time": ratio(new, old), "memory": new.megabytes / old.megabytes}
                for name, (new, old) in pairs.items()
            }


def growth(folder: Path) -> dict[str, Any]:
    """Return time and memory of an update of `adjoint` over those of each series' first."""
    wide = folder / "wide"
    write_tiny(wide, side=16)
    series = {
        "steps": {n: ours(folder, "adjoint", BATCH, n) for n in (10, 30, 100)},
        "paths": {n: ours(folder, "adjoint", n, STEPS) for n in (8, 16, 32)},
        "paths in parts of 8": {n: ours(folder, "adjoint", n, STEPS, 8) for n in (8, 16, 32)},
        "side of the latents": {8: ours(folder, "adjoint", BATCH, STEPS), 16: ours(wide, "adjoint", BATCH, STEPS)},
        "controls": {n: ours(folder, "adjoint", BATCH, STEPS, 0, n) for n in (1, 2, 3)},
    }
    figures: dict[str, Any] = {}
    for name, commands in series.items():
        with raced({str(n): command for n, command in commands.items()}, 3) as run:
            figures[name] = over_first(run)
        print(name, json.dumps(rounded(figures[name])), flush=True)
    # x and z of a rollout, the adjoints and the prior's means: four numbers for each of a path's
    figures["trajectory_megabytes"] = {n: 4 * n * BATCH * 4 * 8 * 8 * 4 / 2**20 for n in (10, 30, 100)}
    return figures


def over_first(run: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Return time and memory of an update over those of the first contender."""
    first = next(iter(run.values()))
    return {
        name: {"time": ratio(each, first), "memory": each.megabytes / first.megabytes, "megabytes": each.megabytes}
        for name, each in run.items()
    }


def shared(folder: Path) -> dict[str, Any]:
    """Return CPU seconds and memory of an update of `adjoint` on 32 paths, of the slowest of several processes."""
    counts = {str(n): n for n in (1, 2, 4)}
    with raced({name: ours(folder, "adjoint", 32, STEPS) for name in counts}, ROUNDS, counts) as run:
        return over_first(run)


def time_to_gap(folder: Path) -> dict[str, Any]:
    """Return CPU seconds of training until the certificate's gap is below a level, over those of `adjoint`.

    The prior is a mixture of two Gaussians in the plane, y its component: the network is small, so this compares the
    updates that learners need, not the cost of an evaluation. The certificate's time is not counted.
    """
    levels, marks = (1.0, 0.5, 0.3), {}
    for name in ("weighted", "adjoint", "backprop", "ppo"):
        torch.manual_seed(0)
        prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5, Cosine(), torch.tensor([0.3, 0.7]))
        policy, times = Policy(prior, SideControl("y", ("a", "b"), prior)), prior.schedule.times(25, 0.1)
        setting = {"reward": Reward({"y": ComponentLabel(prior)}), "conditions": Conditions({}, {"y": 2})}
        x_prior = paths(prior, 8000, times, torch.Generator().manual_seed(1)).x_0
        table = prior_table(*setting.values(), x_prior)
        learner = {
            "weighted": lambda t=times, x=x_prior: Weighted(x, t, 256), "adjoint": lambda t=times: Adjoint(t, 128),
            "backprop": lambda t=times: Backprop(t, 64), "ppo": lambda t=times: PPO(t, 128),
        }[name]()  # fmt: skip
        updates = fit(
            policy, learner(policy, *setting.values(), torch.Generator().manual_seed(0)), GAP_UPDATES,
            {"embedding": 1e-2, "adapter": 3e-3},
        )  # fmt: skip
        total, reached = 0.0, dict.fromkeys(map(str, levels))
        for block in range(GAP_UPDATES // GAP_EVERY):
            total += seconds(lambda u=updates: [next(u) for _ in range(GAP_EVERY)])
            labels, _ = setting["conditions"].of(setting["conditions"].all(1000))
            generator = torch.Generator().manual_seed(2)
            x_0, kl, log_ratio = paths(policy, 2000, times, generator, labels=labels, compare=True)
            with torch.no_grad():
                certificate = certify(setting["conditions"], table, setting["reward"](x_0, labels), kl, log_ratio)
            for level in levels:
                if certificate.gap is not None and certificate.gap < level and reached[str(level)] is None:
                    reached[str(level)] = {"seconds": total, "updates": (block + 1) * GAP_EVERY}
            if all(reached.values()):
                break
        marks[name] = reached
    unit = {level: mark["seconds"] for level, mark in marks["adjoint"].items() if mark}
    return {
        name: {
            level: None if mark is None else {"updates": mark["updates"], "time": mark["seconds"] / unit[level]}
            for level, mark in reached.items() if level in unit
        }
        for name, reached in marks.items()
    }  # fmt: skip


def traces(folder: Path) -> dict[str, Any]:
    """Return the largest shares of an update's own time by operation, from torch.profiler."""
    setting, figures = Setting.from_folder(folder, STEPS, latent=True), {}
    for name in LEARNERS:
        run = setting.updates(name, BATCH)
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            run()
        times = {event.key: event.self_cpu_time_total for event in trace.key_averages()}
        largest = sorted(times, key=times.get, reverse=True)[:8]
        figures[name] = {key: times[key] / sum(times.values()) for key in largest}
    return figures


def options(folder: Path) -> dict[str, Any]:
    """Return the time of other forward passes over the plain one, and whether the bits are the same."""
    plain, last, other = (Setting.from_folder(folder, STEPS).prior.denoiser.network for _ in range(3))
    compiled = torch.compile(other)
    last.to(memory_format=torch.channels_last)
    x_t = torch.randn(2 * BATCH, 4, 8, 8)
    timestep, rows = torch.full((2 * BATCH,), 500.0), torch.randn(2 * BATCH, 16, plain.config.cross_attention_dim)
    runs = {
        "plain": lambda: plain(x_t, timestep, rows, return_dict=False)[0],
        "channels last": lambda: last(x_t.to(memory_format=torch.channels_last), timestep, rows, return_dict=False)[0],
        "torch.compile": lambda: compiled(x_t, timestep, rows, return_dict=False)[0],
    }
    with torch.no_grad():
        predictions = {name: run() for name, run in runs.items()}
        rounds = [{name: seconds(run, 5) for name, run in runs.items()} for _ in range(ROUNDS)]
    return {
        name: {
            "time": statistics.median(each[name] / each["plain"] for each in rounds),
            "same_bits": torch.equal(predictions[name], predictions["plain"]),
        }
        for name in runs
    }


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "share_of_limit": share,
    "vs_reference": against_reference,
    "vs_trl": against_trl,
    "vs_before": against_before,
    "growth": growth,
    "processes": shared,
    "time_to_gap": time_to_gap,
    "traces": traces,
    "options": options,
}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["contender"]:
        torch.manual_seed(0)
        batch, steps, micro, controls = map(int, arguments[3:])
        serve(Setting.from_folder(Path(arguments[1]), steps, controls=controls).run(arguments[2], batch, micro or None))
        return
    torch.set_num_threads(1)
    for name in arguments or PARTS:
        with TemporaryDirectory() as folder:
            write_tiny(Path(folder))
            load = os.getloadavg()[0]
            figures = {**PARTS[name](Path(folder)), "load": load}
        print(name, json.dumps(rounded(figures)), flush=True)
        keep(name, figures)


if __name__ == "__main__":
    main()
