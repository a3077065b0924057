"""Where the time of an update goes, and what others take for one: docs/performance.md, bench/results.json.

python bench/speed.py                    (half an hour on one quiet thread; makes the peer's environment the first time)
python bench/speed.py share_of_limit|vs_reference|vs_trl|growth …        (parts of it)
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
from race import CLASSES, GUIDANCE, PROMPTS, RANK, Brightness, Command, Contender, raced, serve

from ctrl_diffusion.conditions import Conditions
from ctrl_diffusion.control import LoRAControl, Policy
from ctrl_diffusion.files import rounded, write_json
from ctrl_diffusion.learn import Learner
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.pretrained import Prior
from ctrl_diffusion.reward import Reward
from ctrl_diffusion.rollout import Times
from ctrl_diffusion.sample import paths
from ctrl_diffusion.train import fit

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PEER = HERE.parent / "runs" / "peer"
PEER_PACKAGES = ("torch==2.13.0", "trl==0.22.2", "diffusers==0.35.2", "transformers<5", "peft")
BATCH, STEPS, ROUNDS = 8, 10, 7
LR = {"embedding": 1e-5, "adapter": 1e-5}
K = 5  # steps of each path that adjoint and ppo look at in an update
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
        reward = Reward({name: Brightness(latent) for name in names}, decode=prior.decode)
        conditions = Conditions.trained({"c": torch.arange(len(PROMPTS))}, {name: CLASSES for name in names})
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

    def updates(self, name: str, batch: int, micro: int | None = None) -> Callable[[], None]:
        """What runs one update."""
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
            wanted = ([x] if "x" in to else []) + (policy.trained() if "θ" in to else [])
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
        for p in setting.policy.trained():  # zeros are quicker than what is trained
            p.add_(0.01 * torch.randn(p.shape))
    labels = {"y0": torch.arange(BATCH) % CLASSES}
    cond = {"c": torch.zeros(BATCH, dtype=torch.long)}
    draw = {"times": setting.times, "generator": torch.Generator().manual_seed(0), "cond": cond}
    batches = {name: 64 if name == "weighted" else BATCH for name in LEARNERS}
    runs: dict[str, Callable[[], object]] = {
        "sampling": lambda: paths(setting.policy, BATCH, labels=labels, **draw),
        "prior's sampling": lambda: paths(setting.policy.prior, BATCH, **draw),
        **{name: setting.updates(name, batches[name]) for name in LEARNERS},
    }
    counts = {name: evaluations(name, STEPS) for name in runs}
    sizes = {(kind, times * batches.get(name, BATCH)) for name in runs for kind, times in counts[name]}
    ratios: dict[str, list[float]] = {name: [] for name in [*runs, "policy / prior"]}
    for i in range(ROUNDS + 1):
        alone = {}
        for kind, batch in sorted(sizes):
            with bare(setting, kind, batch) as run:
                alone[kind, batch] = seconds(run, 3)
        took = {name: seconds(run) for name, run in runs.items()}
        again = {}
        for kind, batch in sorted(sizes):
            with bare(setting, kind, batch) as run:
                again[kind, batch] = seconds(run, 3)
        if i == 0:
            continue
        for name, made in counts.items():
            limit = sum(
                n * (alone[kind, times * batches.get(name, BATCH)] + again[kind, times * batches.get(name, BATCH)]) / 2
                for (kind, times), n in made.items()
            )
            ratios[name].append(limit / took[name])
        ratios["policy / prior"].append(took["sampling"] / took["prior's sampling"])
    return {name: statistics.median(found) for name, found in ratios.items()}


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
    for batch, micro in ((BATCH, 0), (4 * BATCH, BATCH)):
        commands = {"ours": ours(folder, "backprop", batch, STEPS, micro), "reference": reference(folder, batch, STEPS)}
        with raced(commands, ROUNDS if not micro else 5) as run:
            mine, other = run["ours"], run["reference"]
            figures = {"time_ratio": ratio(mine, other), "memory_ratio": mine.megabytes / other.megabytes}
            figures["megabytes"] = [mine.megabytes, other.megabytes]
        found |= {f"{batch} paths in parts of {micro}": figures} if micro else figures
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
            first = run[str(next(iter(commands)))]
            found[name] = {
                n: {"time": ratio(each, first), "memory": each.megabytes / first.megabytes, "megabytes": each.megabytes}
                for n, each in run.items()
            }
        print(name, json.dumps(rounded(found[name])), flush=True)
    # x and z of a rollout, the adjoints and the prior's means: four numbers for each of a path's
    found["trajectory_megabytes"] = {n: 4 * n * BATCH * 4 * 8 * 8 * 4 / 2**20 for n in (10, 30, 100)}
    return found


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "share_of_limit": share,
    "vs_reference": against_reference,
    "vs_trl": against_trl,
    "growth": growth,
}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["contender"]:
        torch.manual_seed(0)
        batch, steps, micro, controls = map(int, arguments[3:])
        serve(Setting.of(Path(arguments[1]), steps, controls=controls).updates(arguments[2], batch, micro or None))
        return
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in arguments or PARTS:
        with TemporaryDirectory() as folder:
            write_tiny(Path(folder))
            load = os.getloadavg()[0]
            results[name] = {**PARTS[name](Path(folder)), "load": load}
        print(name, json.dumps(rounded(results[name])), flush=True)
        write_json(RESULTS, results)


if __name__ == "__main__":
    main()
