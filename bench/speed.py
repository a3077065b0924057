"""Where the time of an update goes, and what others take for one: docs/performance.md, bench/results/speed.json.

python bench/speed.py                    (half an hour on one quiet thread; makes the peer's environment the first time)
python bench/speed.py share_of_limit|vs_reference|vs_trl|vs_before|growth|processes|time_to_gap|traces|options …
python bench/speed.py contender FOLDER LEARNER BATCH STEPS MICRO CONTROLS        (one of them, see bench/race.py)

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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from models import pipeline
from race import CLASSES, GUIDANCE, PROMPTS, RANK, Brightness, Command, Contender, keep, raced, serve

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.rollout import Times
from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.evaluate.certificate import certify
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.fit import Update, fit
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.step import Learner
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.reward import Reward, prior_table
from ctrl_diffusion.system.files import rounded

HERE = Path(__file__).parent
PEER = HERE.parent / "runs" / "peer"
BEFORE = "d456200"  # the commit before its steps were measured
PEER_PACKAGES = ("torch==2.13.0", "trl==0.22.2", "diffusers==0.35.2", "transformers<5", "peft")
BATCH, STEPS, ROUNDS = 8, 10, 9
LR = {"embedding": 1e-5, "adapter": 1e-5}
GAP_UPDATES, GAP_EVERY = 400, 10
K = 5  # steps of each path that adjoint and ppo look at in an update
DRAWN = ("sampling", "prior's sampling")
LEARNERS = ("weighted", "adjoint", "lean", "backprop", "ppo")


def write_tiny(folder: Path, side: int = 8) -> None:
    """The pipeline; its tokenizer also in the files that transformers read before version 5."""
    torch.manual_seed(0)
    made = pipeline("tiny")
    made.unet.register_to_config(sample_size=side)
    made.save_pretrained(folder)
    words = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


@dataclass
class Setting:
    """A policy on the tiny prior, its chain, and what it is trained for."""

    prior: Prior
    policy: Policy
    times: Times
    conditions: Conditions
    reward: Reward

    @classmethod
    def of(cls, folder: Path, steps: int, latent: bool = False, controls: int = 1) -> "Setting":
        """The setting; p̂ looks at images, or at latents."""
        prior = Prior.from_pretrained(folder).with_prompts(PROMPTS, guidance=GUIDANCE)
        names = [f"y{i}" for i in range(controls)]
        classes = tuple(map(str, range(CLASSES)))
        attached = [LoRAControl(name, classes, prior.denoiser, rank=RANK) for name in names]
        reward = Reward({name: Brightness(latent) for name in names}, codec=prior.codec)
        conditions = Conditions.for_training({"c": torch.arange(len(PROMPTS))}, {name: CLASSES for name in names})
        times = prior.denoiser.times(steps, 0.05, 2.0)
        return cls(prior, Policy(prior.denoiser, *attached), times, conditions, reward)

    def learner(self, name: str, batch: int, micro: int | None = None) -> Learner:
        """A learner that rolls out anew for every update."""
        adjoint = {"batch": batch, "micro": micro, "regressed": K, "reuse": 1}
        return {
            "weighted": lambda: Weighted(torch.randn(64, *self.policy.shape), self.times, batch, micro=micro),
            "adjoint": lambda: Adjoint(self.times, **adjoint),
            "lean": lambda: Adjoint(self.times, **adjoint, lean=True),
            "backprop": lambda: Backprop(self.times, batch, micro=micro),
            "ppo": lambda: PPO(self.times, batch, micro=micro, surrogates=K, reuse=1),
        }[name]()

    def run(self, name: str, batch: int, micro: int | None = None) -> Callable[[], object]:
        """What runs one update of a learner, or draws one batch of samples."""
        if "sampling" not in name:
            return self.updates(name, batch, micro)
        labels = {y: torch.arange(batch) % CLASSES for y in self.policy.controls} if name == "sampling" else None
        denoiser = self.policy if labels else self.policy.prior
        cond, generator = {"c": torch.zeros(batch, dtype=torch.long)}, torch.Generator().manual_seed(0)
        return lambda: paths(denoiser, batch, self.times, generator, cond, labels)

    def updates(self, name: str, batch: int, micro: int | None = None) -> Callable[[], Update]:
        """What runs one update of a learner."""
        learner = self.learner(name, batch, micro)
        stream = learner(self.policy, self.reward, self.conditions, torch.Generator().manual_seed(0))
        return fit(self.policy, stream, 10**6, LR).__next__


def evaluations(name: str, n: int, k: int = K) -> dict[tuple[str, int], int]:
    """Calls of the network in one update, by kind and by how many times the batch goes through it at once.

    Kinds: prior or policy, forward alone or with backward to the state ("x") or to the parameters ("θ").
    """
    regression = {("policy θ", k): 1}
    made: dict[str, dict[tuple[str, int], int]] = {
        "sampling": {("policy", 1): n, ("prior", 1): 1},
        "prior's sampling": {("prior", 1): n + 1},
        "weighted": {("policy θ", 1): 1},
        # the rollout; the read-out; adjoints of all states but the first, whose step has its prior's mean alone
        "adjoint": {("policy", 1): n, ("prior x", 1): n, ("policy x", 1): n - 1, ("prior", 1): 1, **regression},
        "lean": {("policy", 1): n, ("prior x", 1): n, ("prior", 1): 1, **regression},
        # there and back again; nobody asks for the gradient at the first state
        "backprop": {("policy", 1): n, ("prior", 1): n, ("prior x", 1): n, ("policy θ", 1): 1, ("policy xθ", 1): n - 1},
        "ppo": {("policy", 1): n, ("prior", 1): n + 1, **regression},
    }
    return made[name]


@contextmanager
def bare(setting: Setting, kind: str, batch: int) -> Iterator[Callable[[], None]]:
    """Inside, one evaluation of the network itself, for a batch of samples under guidance."""
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
            made = network(x, timestep, rows, return_dict=False)[0]
        if to:
            wanted = ([x] if "x" in to else []) + (policy.trainable() if "θ" in to else [])
            torch.autograd.grad(made, wanted, gradient)

    with ExitStack() as stack:
        if who == "policy" and "θ" not in to:  # W + BA are in place
            stack.enter_context(policy.frozen())
            stack.enter_context(control.active(y))
        yield run


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """CPU seconds of one run, the mean of some."""
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - begin) / repeats


def share(folder: Path) -> dict[str, float]:
    """What the evaluations alone would take, over what an update takes: for sampling and every learner."""
    setting = Setting.of(folder, STEPS, latent=True)
    with torch.no_grad():
        for p in setting.policy.trainable():  # zeros are quicker than what is trained
            p.add_(0.01 * torch.randn(p.shape))
    ratios: dict[str, list[float]] = {name: [] for name in [*DRAWN, *LEARNERS, "policy / prior"]}
    runs = {name: setting.run(name, batch_of(name)) for name in [*DRAWN, *LEARNERS]}

    def alone(name: str) -> float:
        """What the evaluations of one update take, each kind timed anew."""
        total = 0.0
        for (kind, times), n in evaluations(name, STEPS).items():
            with bare(setting, kind, times * batch_of(name)) as evaluate:
                total += n * seconds(evaluate, 2)
        return total

    for i in range(ROUNDS + 1):
        took = {}
        for name, run in runs.items():
            before = alone(name)
            took[name] = seconds(run)
            if i:  # the first round is not counted
                ratios[name].append((before + alone(name)) / 2 / took[name])
        if i:
            ratios["policy / prior"].append(took["sampling"] / took["prior's sampling"])
    return {name: statistics.median(found) for name, found in ratios.items()}


def batch_of(name: str) -> int:
    """Paths, or samples of the cache, in an update."""
    return 8 * BATCH if name == "weighted" else BATCH


def ours(folder: Path, learner: str, batch: int, steps: int, micro: int = 0, controls: int = 1) -> Command:
    """The command of a contender of our own."""
    return sys.executable, __file__, "contender", folder, learner, batch, steps, micro, controls


def reference(folder: Path, batch: int, steps: int) -> Command:
    """The command of the reference schedule on our own grid."""
    times = Prior.from_pretrained(folder).denoiser.times(steps, 0.05, 2.0)
    return sys.executable, HERE / "reference.py", folder, batch, ",".join(map(str, times))


def peer(folder: Path, trainer: str, batch: int, steps: int) -> Command:
    """The command of a trainer of trl in its own environment, which is made if there is none."""
    python = PEER / "bin" / "python"
    if not (PEER / "ready").exists():
        venv.create(PEER, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True)
        (PEER / "ready").touch()
    return python, HERE / "peer.py", folder, trainer, batch, steps


def ratio(mine: Contender, other: Contender) -> float:
    """Of the time of an update: the median over rounds."""
    return statistics.median(a / b for a, b in zip(mine.seconds, other.seconds, strict=True))


def against_reference(folder: Path) -> dict[str, Any]:
    """The same loss by the reference schedule: ours at once, and on more paths in parts."""
    found: dict[str, Any] = {}
    for batch, micro in ((BATCH, 0), (4 * BATCH, 0), (4 * BATCH, 2 * BATCH)):
        commands = {"ours": ours(folder, "backprop", batch, STEPS, micro), "reference": reference(folder, batch, STEPS)}
        with raced(commands, ROUNDS if batch == BATCH else 5) as run:
            mine, other = run["ours"], run["reference"]
            figures = {"time_ratio": ratio(mine, other), "memory_ratio": mine.megabytes / other.megabytes}
            figures["megabytes"] = [mine.megabytes, other.megabytes]
        if batch == BATCH:
            found = figures
        else:
            found[f"{batch} paths" + (f" in parts of {micro}" if micro else "")] = figures
    return found


def against_trl(folder: Path) -> dict[str, Any]:
    """AlignProp through all steps against `backprop`, DDPO on all steps against `ppo` on as many."""
    commands = {
        "backprop": ours(folder, "backprop", BATCH, STEPS), "alignprop": peer(folder, "alignprop", BATCH, STEPS),
        "ppo": ours(folder, "ppo", BATCH, STEPS), "ddpo": peer(folder, "ddpo", BATCH, STEPS),
    }  # fmt: skip
    with raced(commands, ROUNDS) as run:
        pairs = {"backprop": "alignprop", "ppo": "ddpo"}
        updates = {mine: ratio(run[mine], run[other]) for mine, other in pairs.items()}
        memory = {mine: run[mine].megabytes / run[other].megabytes for mine, other in pairs.items()}
    # ours: the policy and the prior, there and back; theirs the policy, without a KL
    evaluations_ratio = 2.0
    return {
        "time_ratio": updates["backprop"] / evaluations_ratio, "memory_ratio": memory["backprop"],
        "update_ratio": updates["backprop"], "ddpo": {"update_ratio": updates["ppo"], "memory_ratio": memory["ppo"]},
    }  # fmt: skip


def against_before(folder: Path) -> dict[str, Any]:
    """This library against itself as it was at a commit, for its history: it says what was gained."""
    with TemporaryDirectory() as before:
        archive = subprocess.run(["git", "archive", BEFORE, "src"], cwd=HERE.parent, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", before], input=archive.stdout, check=True)
        commands: dict[str, Command] = {}
        for name in (DRAWN[0], *LEARNERS):
            own = ours(folder, name, batch_of(name), STEPS)
            commands |= {name: own, f"{name} before": ("env", f"PYTHONPATH={before}/src", *own)}
        with raced(commands, ROUNDS) as run:
            return {
                name: {
                    "time": ratio(run[name], run[f"{name} before"]),
                    "memory": run[name].megabytes / run[f"{name} before"].megabytes,
                }
                for name in (DRAWN[0], *LEARNERS)
            }


def growth(folder: Path) -> dict[str, Any]:
    """Time and memory of an update of `adjoint`, each over those of the first: what grows with what."""
    wide = folder / "wide"
    write_tiny(wide, side=16)
    series = {
        "steps": {n: ours(folder, "adjoint", BATCH, n) for n in (10, 30, 100)},
        "paths": {n: ours(folder, "adjoint", n, STEPS) for n in (8, 16, 32)},
        "paths in parts of 8": {n: ours(folder, "adjoint", n, STEPS, 8) for n in (8, 16, 32)},
        "side of the latents": {8: ours(folder, "adjoint", BATCH, STEPS), 16: ours(wide, "adjoint", BATCH, STEPS)},
        "controls": {n: ours(folder, "adjoint", BATCH, STEPS, 0, n) for n in (1, 2, 3)},
    }
    found: dict[str, Any] = {}
    for name, commands in series.items():
        with raced({str(n): command for n, command in commands.items()}, 3) as run:
            found[name] = over_first(run)
        print(name, json.dumps(rounded(found[name])), flush=True)
    # x and z of a rollout, the adjoints and the prior's means: four numbers for each of a path's
    found["trajectory_megabytes"] = {n: 4 * n * BATCH * 4 * 8 * 8 * 4 / 2**20 for n in (10, 30, 100)}
    return found


def over_first(run: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Time and memory of an update, over those of the first contender."""
    first = next(iter(run.values()))
    return {
        name: {"time": ratio(each, first), "memory": each.megabytes / first.megabytes, "megabytes": each.megabytes}
        for name, each in run.items()
    }


def shared(folder: Path) -> dict[str, Any]:
    """An update of `adjoint` on 32 paths by several processes: CPU seconds and memory of the one that takes most."""
    counts = {str(n): n for n in (1, 2, 4)}
    with raced({name: ours(folder, "adjoint", 32, STEPS) for name in counts}, ROUNDS, counts) as run:
        return over_first(run)


def time_to_gap(folder: Path) -> dict[str, Any]:
    """CPU seconds of training until the certificate's gap is below some nats, over those of `adjoint`.

    On a mixture of two Gaussians in the plane, y its component: the network is small, so these are the learners' own
    needs for updates and not the cost of an evaluation. What the certificate takes is not counted.
    """
    levels, found = (1.0, 0.5, 0.3), {}
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
        taken, reached = 0.0, dict.fromkeys(map(str, levels))
        for block in range(GAP_UPDATES // GAP_EVERY):
            taken += seconds(lambda u=updates: [next(u) for _ in range(GAP_EVERY)])
            labels, _ = setting["conditions"].of(setting["conditions"].all(1000))
            drawn = torch.Generator().manual_seed(2)
            x_0, kl, log_ratio = paths(policy, 2000, times, drawn, labels=labels, compare=True)
            with torch.no_grad():
                found_now = certify(setting["conditions"], table, setting["reward"](x_0, labels), kl, log_ratio)
            for level in levels:
                if found_now.gap < level and reached[str(level)] is None:
                    reached[str(level)] = {"seconds": taken, "updates": (block + 1) * GAP_EVERY}
            if all(reached.values()):
                break
        found[name] = reached
    at = {level: found["adjoint"][level]["seconds"] for level in found["adjoint"] if found["adjoint"][level]}
    return {
        name: {
            level: None if mark is None else {"updates": mark["updates"], "time": mark["seconds"] / at[level]}
            for level, mark in reached.items() if level in at
        }
        for name, reached in found.items()
    }  # fmt: skip


def traces(folder: Path) -> dict[str, Any]:
    """What torch.profiler sees in an update: the share of its operations' own time by operation, the largest first."""
    setting, found = Setting.of(folder, STEPS, latent=True), {}
    for name in LEARNERS:
        run = setting.updates(name, BATCH)
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            run()
        own = {event.key: event.self_cpu_time_total for event in trace.key_averages()}
        largest = sorted(own, key=own.get, reverse=True)[:8]
        found[name] = {key: own[key] / sum(own.values()) for key in largest}
    return found


def options(folder: Path) -> dict[str, Any]:
    """Other ways to run the network: their forward pass over the plain one, and whether the bits are the same."""
    plain, last, other = (Setting.of(folder, STEPS).prior.denoiser.network for _ in range(3))
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
        made = {name: run() for name, run in runs.items()}
        took = [{name: seconds(run, 5) for name, run in runs.items()} for _ in range(ROUNDS)]
    return {
        name: {
            "time": statistics.median(each[name] / each["plain"] for each in took),
            "same_bits": torch.equal(made[name], made["plain"]),
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
        serve(Setting.of(Path(arguments[1]), steps, controls=controls).run(arguments[2], batch, micro or None))
        return
    torch.set_num_threads(1)
    for name in arguments or PARTS:
        with TemporaryDirectory() as folder:
            write_tiny(Path(folder))
            load = os.getloadavg()[0]
            found = {**PARTS[name](Path(folder)), "load": load}
        print(name, json.dumps(rounded(found)), flush=True)
        keep(name, found)


if __name__ == "__main__":
    main()
