"""Two processes do what one does: the same draws, the sum of their gradients, one set of files."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import yaml
from pipelines import saved
from safetensors.torch import load_file

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.task import Task, new_policy
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.contrast import Contrast
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.labelled import Labelled
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.sharding import shard
from ctrl_diffusion.reward.reward import Reward
from ctrl_diffusion.system import ranks
from tests.prior.priors import states_to
from tests.whole.test_resume import SETTINGS, contents

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["ctrl_diffusion.exact.races", "ctrl_diffusion.prior.prior"])


def learners_of(samples, drawn):
    """Each with batches of samples or of paths that it draws, in micro-batches and without."""
    return {
        "contrast": lambda times, x_0, y, cond: Contrast(states_to(x_0, times), times, batch=samples, micro=4),
        "weighted": lambda times, x_0, y, cond: Weighted(x_0, times, batch=samples, micro=2),
        "adjoint": lambda times, x_0, y, cond: Adjoint(times, drawn, regressed=2, reuse=2, micro=2),
        "backprop": lambda times, x_0, y, cond: Backprop(times, drawn, micro=2),
        "labelled": lambda times, x_0, y, cond: Labelled(
            x_0, {y: torch.arange(len(x_0)) % 2}, cond, times, batch=samples
        ),
        "ppo": lambda times, x_0, y, cond: PPO(times, drawn, surrogates=2, reuse=2),
    }


LEARNERS, EVEN = (
    learners_of(7, 5),
    learners_of(6, 6),
)  # shares that are unequal; they must be equal where weights are sharded
TRAININGS = [*((name, learner) for name in ("ring", "DDPM") for learner in LEARNERS), ("SD 1", "adjoint")]
SHARDED = [*(("DDPM", learner) for learner in EVEN if learner != "labelled"), ("DiT", "adjoint"), ("two", "backprop")]
SHARDED += [("apart", "weighted"), ("apart", "adjoint")]
TWO = {"two": (None, None), "apart": (slice(0, 2), slice(2, 3))}  # the steps at which each of two controls speaks
SHARDED_TOO = [("DDPM", "labelled"), ("SD 1", "adjoint"), ("SD 3", "adjoint"), ("Flux", "adjoint"), ("two", "adjoint")]
LR, UPDATES = 1e-2, 3


class Bright:
    """Whether images are bright."""

    def log_prob(self, x):
        score = 4 * x.flatten(1).mean(1)
        return F.logsigmoid(torch.stack([-score, score], dim=1))


def model(name, root):
    """A policy in double precision, where another order of summation is worth 1e-15; reward, conditions, times."""
    if name == "ring":
        task = Task("vp", "logistic", steps=4)
        return new_policy(task).double(), task.reward(torch.float64), task.conditions, task.times
    size = (32, 32) if name == "Flux" else None  # its default is 1024 × 1024
    prior = Prior.from_pretrained(root / ("DDPM" if name in TWO else name), size)
    prior = prior.with_prompts(["a seven", "two"]) if prior.text else prior
    prior.denoiser.double()
    if ranks.sharded():
        shard(prior.denoiser)
    controls, times = ("side", "tone") if name in TWO else ("side",), prior.denoiser.times(3, 0.2)
    policy = Policy(prior.denoiser, *(LoRAControl(y, "01", prior.denoiser, rank=2) for y in controls)).double()
    conditions = Conditions.for_training({"c": torch.arange(2)} if prior.classes else {}, dict.fromkeys(controls, 2))
    for y, steps in zip(controls, TWO.get(name, ()), strict=False):
        sigma = [float(policy.schedule(t)[1]) for t in times[:-1]][steps] if steps else None
        policy.controls[y].interval = sigma and (0.999 * sigma[-1], sigma[0])
    return policy, Reward({y: Bright() for y in controls}), conditions, times


def training(name, learner, root, learners=LEARNERS):
    """Weights, losses, gradient norms and figures of a few updates."""
    policy, reward, conditions, times = model(name, root)
    cond = conditions.cond_of(torch.arange(8) * conditions.groups // 8)
    x_0 = paths(policy.prior, 8, times, torch.Generator().manual_seed(1), cond).x_0
    stream = learners[learner](times, x_0, "side", cond)(policy, reward, conditions, torch.Generator().manual_seed(2))
    updates = list(fit(policy, stream, UPDATES, {"embedding": LR, "adapter": LR}, warmup=1))
    assert all(p.grad is None for p in policy.trainable())
    figures = [[u.loss, u.gradient_norm, *(u.metrics[key] for key in sorted(u.metrics))] for u in updates]
    prior = [p for name, p in policy.prior.named_parameters() if "lora_" not in name]
    shards = [getattr(p, "to_local", lambda p=p: p)() for p in prior]
    held = sum(p.numel() for p in shards) / max(1, sum(p.numel() for p in prior))  # the ring has no weights
    return {"weights": policy.snapshot(), "figures": torch.tensor(figures), "held": held}


def simulated():
    """Paths in batches, and where the stream is after them."""
    torch.set_default_dtype(torch.float32)
    task = Task("flow", "logistic", steps=4)
    policy, results = new_policy(task), []
    for p in policy.trainable():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(3))
    for n in (23, 4):  # of the second a rank has none
        labels, cond = task.conditions.of(torch.arange(n) % task.conditions.pairs)
        generator, seen = torch.Generator().manual_seed(4), []
        how = {"compare": True, "batch": 5, "progress": seen.append}
        results += paths(policy, n, task.times, generator, cond, labels, **how)
        assert sum(seen) == n
        results.append(generator.get_state())
    return results


def without_the_sum():
    """Embeddings of every rank after updates whose gradients of the embedding stay each rank's own."""
    whole = ranks.all_reduce_gradients
    ranks.all_reduce_gradients = lambda parameters: whole(parameters[1:])
    policy, reward, conditions, times = model("ring", None)
    assert policy.trainable()[0] is policy.controls["side"].table.weight
    stream = Backprop(times, 4)(policy, reward, conditions, torch.Generator().manual_seed(2))
    list(fit(policy, stream, UPDATES, {"embedding": LR, "adapter": LR}, warmup=1))
    ranks.all_reduce_gradients = whole
    return policy.controls["side"].table.weight.detach()


def refusal(what):
    try:
        what()
    except ValueError as error:
        return str(error)


def only_first():
    assert ranks.is_main()
    assert ranks.world_size() == 1, "alone"
    raise ValueError("nothing to write to")


def everything(root):
    """All that is compared."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    results = {"refused": refusal(lambda: ranks.broadcast(only_first))}
    results |= {pair: training(*pair, root) for pair in TRAININGS}
    results["embedding"] = without_the_sum()
    results["paths"] = simulated()
    results["small"] = refusal(lambda: ranks.rank_rows(1))
    return results


def whole_and_sharded(root, trainings):
    """Trainings of a prior whose weights every rank has (False), and of one whose weights are sharded (True)."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    LoRAControl._merged = LoRAControl._unmerged  # as where weights are sharded: W + BA would round otherwise
    results = {False: in_step(root, trainings)}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    results[True] = in_step(root, trainings)
    return results


def in_step(root, trainings):
    results = {pair: training(*pair, root, EVEN) for pair in trainings}
    policy, _, conditions, times = model("two", root)
    for p in policy.trainable():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(3))
    results["paths"] = []
    for n in (11, 3):  # three batches, of which one rank has one less, and one
        pair = torch.arange(n) % conditions.pairs
        labels = {"side": pair % 2, "tone": torch.where(pair < 5, -1, pair % 2)}
        how = {"compare": True, "batch": 4, "strength": 1.5}
        results["paths"] += paths(policy, n, times, torch.Generator().manual_seed(4), {}, labels, **how)
    results["uneven"] = refusal(lambda: ranks.rank_rows(3))
    return results


def set_rank(rank, port):
    """Make this process one of two."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def rank_of_two(rank, port, root, work):
    set_rank(rank, port)
    assert ranks.world_size() == 2
    torch.save(work(root), root / f"{rank}.pt")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(work, root, families):
    """Two processes at work on tiny pipelines."""
    for name in families:
        saved(name, root / name)
    port = free_port()
    two = [processes.Process(target=rank_of_two, args=(rank, port, root, work)) for rank in range(2)]
    for process in two:
        process.start()
    return two


def ended(two, root):
    """Return the results of each."""
    for process in two:
        process.join(timeout=600)  # processes out of step wait for each other for ever
        process.kill()
    assert [process.exitcode for process in two] == [0, 0]
    return [torch.load(root / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process finds, and each of two."""
    root = tmp_path_factory.mktemp("ranks")
    two = started(everything, root, ("DDPM", "SD 1"))
    try:
        one = everything(root)
    finally:
        torch.set_default_dtype(torch.float32)
    return one, *ended(two, root)


def both_ways(trainings, root):
    """What each of two processes finds with all weights, and with half of them."""
    if torch.__version__ < "2.7":
        pytest.skip("FSDP2 of torch 2.6 records events of streams, which a CPU has none of there")
    families = {"DDPM", *(name for name, _ in trainings)} - {*TWO}
    return ended(started(partial(whole_and_sharded, trainings=trainings), root, families), root)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return both_ways(SHARDED, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def sharded_too(tmp_path_factory):
    return both_ways(SHARDED_TOO, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize(("name", "learner"), TRAININGS)
def test_two_processes_train_as_one_with_the_same_batch(results, name, learner):
    check_alike(*(each[name, learner] for each in results))


@pytest.mark.parametrize(("name", "learner"), SHARDED)
def test_processes_with_half_the_weights_each_train_as_with_all(sharded, name, learner):
    check_alike(sharded[0][False][name, learner], *(each[True][name, learner] for each in sharded))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "learner"), SHARDED_TOO)
def test_so_do_those_of_other_families(sharded_too, name, learner):
    check_alike(sharded_too[0][False][name, learner], *(each[True][name, learner] for each in sharded_too))


def check_alike(one, first, second):
    """AdamW divides a gradient by its size: what rounding leaves of one that should be nothing must stay below its ε,
    1e-8; a step of a learning rate is then off by 1e-15/1e-8 of it, or some of these."""
    for p, q, r in zip(one["weights"], first["weights"], second["weights"], strict=True):
        assert torch.equal(q, r), "ranks stay alike to the bit"
        torch.testing.assert_close(q, p, rtol=0, atol=10 * 1e-7 * LR * UPDATES)
    assert torch.equal(first["figures"], second["figures"])
    torch.testing.assert_close(first["figures"], one["figures"], rtol=1e-6, atol=1e-9)
    assert one["weights"][0].abs().max() > LR / 10, "something was learned"


def test_paths_are_the_same_where_weights_are_sharded(sharded):
    for each in sharded:
        for whole, parted in zip(each[False]["paths"], each[True]["paths"], strict=True):
            assert torch.equal(whole, parted)


@pytest.mark.parametrize(("name", "learner"), SHARDED)
def test_a_process_holds_its_part_of_the_weights_after_an_update(sharded, name, learner):
    for each in sharded:
        assert each[False][name, learner]["held"] == 1.0
        assert each[True][name, learner]["held"] == pytest.approx(0.5, abs=0.01), "the first dimension of some is odd"


def test_what_cannot_go_in_step_is_refused(sharded, monkeypatch):
    for each in sharded:
        assert each[False]["uneven"] is None
        assert each[True]["uneven"] == "sharded weights: batch must be a multiple of the 2 processes, got 3."
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert refusal(ranks.state) == "a model is sharded by FSDP2 here. Launch with --use_fsdp --fsdp_version 2."
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert refusal(ranks.state) == "a model is not sharded by DeepSpeed here. Launch with --use_fsdp --fsdp_version 2."


def test_sharded_weights_are_where_accelerate_puts_them():
    output = refusal(lambda: shard(None, "cuda:1"))
    assert output == "device: sharded weights are where accelerate puts them. Use auto, not cuda:1."


def test_paths_of_two_processes_are_those_of_one_to_the_bit(results):
    for one, *two in zip(*(each["paths"] for each in results), strict=True):
        for other in two:
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


def test_the_embeddings_of_two_processes_would_part_without_the_sum_of_their_gradients(results):
    _, first, second = (each["embedding"] for each in results)
    assert (first - second).abs().max() > LR / 10
    alike = [each["ring", "backprop"]["weights"][0] for each in results[1:]]
    assert torch.equal(*alike)


def test_what_rank_0_refuses_all_refuse(results):
    assert [each["refused"] for each in results] == ["nothing to write to"] * 3
    assert results[0]["small"] is None
    assert (
        results[1]["small"]
        == results[2]["small"]
        == ("a batch of 1 cannot be shared by 2 processes. Raise batch, or launch fewer.")
    )


def launched(how, *arguments):
    """ctrl on two processes."""
    plain = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    where = ["--main_process_port", free_port(), "-m", "ctrl_diffusion"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *how.split(), *plain, *where, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(part) for part in command], **pipes)


@pytest.fixture(scope="module", params=["--multi_gpu", "--use_fsdp --fsdp_version 2"])
def launched_run(request, tmp_path_factory):
    """How two processes were launched, a run of all learners on them, and what they output."""
    root = tmp_path_factory.mktemp("launched")
    (root / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    process = launched(request.param, "demo", "--config", root / "settings.yaml", "--out", root / "run")
    output, warned = process.communicate(timeout=600)
    assert process.returncode == 0, warned
    return request.param, root / "run", output, warned


@pytest.mark.slow
def test_a_launched_run_is_that_of_one_process(launched_run, ctrl):
    """In single precision AdamW may take a whole step, either way, for a gradient that is nothing but rounding."""
    _, folder, output, warned = launched_run
    alone = folder.parent / "alone"
    done = ctrl("demo", "--config", folder.parent / "settings.yaml", "--out", alone)
    assert done.returncode == 0, done.stderr
    assert output.replace(str(folder), "") == done.stdout.replace(str(alone), "")
    assert warned.count("ctrl: warning") == done.stderr.count("ctrl: warning")
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (folder, alone)]
    assert files[0] == files[1]
    weights = [load_file(run / "control" / "control.safetensors") for run in (folder, alone)]
    updates, lr = 25, 0.05
    for name, value in weights[0].items():
        miss = (value - weights[1][name]).abs()
        assert miss.max() < 2 * lr * updates
        assert miss.mean() < 1e-3 * lr * updates
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (folder, alone)]
    for name in ("ess_prior_fraction", "objective_nats", "log_z_policy_nats"):
        pair = [each["certificate"][name] for each in metrics]
        assert pair[0] == pytest.approx(pair[1], rel=1e-3), name


@pytest.mark.slow
def test_a_launched_run_that_is_killed_goes_on_to_the_same_bytes(launched_run, tmp_path):
    how, whole, *_ = launched_run
    folder = tmp_path / "run"
    process = launched(how, "demo", "--config", whole.parent / "settings.yaml", "--out", folder)
    log = folder / "progress.jsonl"
    while process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) >= 14):
        time.sleep(0.05)
    os.kill(int((folder / ".lock").read_text()), signal.SIGKILL)  # rank 0; the other does not wait for it
    process.communicate(timeout=120)
    assert process.returncode
    assert list((folder / "checkpoint").glob("*.safetensors"))
    process = launched(how, "train", "--resume", folder)
    _, warned = process.communicate(timeout=600)
    assert process.returncode == 0, warned
    assert contents(folder) == contents(whole)


def loop_first(rank, port, root):
    """Train before anything asks for the ranks."""
    set_rank(rank, port)
    list(fit(new_policy(Task("vp", "logistic", steps=4)), iter([]), 1, {"embedding": 1.0, "adapter": 1.0}))
    (root / str(rank)).write_text(str(ranks.world_size()))


def test_a_training_loop_that_comes_first_is_shared_all_the_same(tmp_path):
    """Where nothing has asked for the ranks before `fit` makes accelerate's own object."""
    port = free_port()
    two = [processes.Process(target=loop_first, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join(timeout=120)
        process.kill()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]


@pytest.mark.parametrize(
    ("started", "by"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
        ({}, "the launcher that set LOCAL_RANK"),
    ],
)
@pytest.mark.parametrize("command", ["compare runs/demo", "inspect digits", "export runs/demo out", "exact --quick"])
def test_what_one_process_does_is_refused_by_several(ctrl_here, monkeypatch, started, by, command):
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"} | started).items():
        monkeypatch.setenv(name, value)
    done, name = ctrl_here(*command.split()), command.split()[0]
    assert (done.returncode, done.stdout) == (2, "")
    work = f"ctrl {name} is the work of one process, and {by} started 2"
    assert done.stderr == f"ctrl: {work}. Start it without {by}.\n"


def test_a_platforms_variables_alone_refuse_nothing(ctrl_here, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    done = ctrl_here("inspect", "digits")
    assert (done.returncode, done.stderr) == (0, "")
