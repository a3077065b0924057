"""A training that is killed, at any moment, goes on as if nothing had happened."""

import json
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.jobs.train import resume_job
from ctrl_diffusion.run.folder import RunFolder
from ctrl_diffusion.system.progress import JobOptions

SETTINGS = {
    "classifier": {"updates": 150, "head": "ordinal", "grid": 1, "depth": 1},
    "learners": ["weighted", "backprop", "ppo", "adjoint"],
    "weighted": {"updates": 6, "batch": 16, "cache": 8, "renoising": 4},
    "backprop": {"updates": 3, "batch": 8},
    "ppo": {"updates": 6, "batch": 8, "reuse": 2},
    "adjoint": {"updates": 6, "batch": 8, "reuse": 2},
    "evaluation": {"prior_samples": 8, "paths": 80, "probes": 2, "sweep_paths": 80},
    "steps": 2,
    "rank": 4,
    "checkpoint": 2,
}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["ctrl_diffusion.commands.jobs.train", "ctrl_diffusion.prior.families.dit", "torch._dynamo"]
)


def go_on(folder, killed_in_save=0):
    """What a user does until the run is there; the process may kill itself in the middle of a save."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    saves, write_bytes = 0, Path.write_bytes

    def half(path, data):
        nonlocal saves
        saves += (here := path.parent.name == "checkpoint")
        if here and saves == killed_in_save:
            write_bytes(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write_bytes(path, data)

    Path.write_bytes = half
    if (folder / "config.yaml").is_file():
        resume_job(folder)
    else:
        demo_job(SETTINGS, folder, JobOptions(overwrite=True))


def started(folder, killed_in_save=0):
    process = processes.Process(target=go_on, args=(folder, killed_in_save))
    process.start()
    return process


def run_to_the_end(folder):
    process = started(folder)
    process.join()
    assert process.exitcode == 0
    assert RunFolder(folder).is_finished


def contents(folder):
    """Bytes of every file by name, without what was measured by a clock."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("report.html")  # it quotes the seconds
    metrics = json.loads(found.pop("metrics.json"))
    return {**found, "metrics": {key: value for key, value in metrics.items() if key != "seconds"}}


def moment(folder):
    """How far a run was, in words."""
    log = folder / "progress.jsonl"
    if not (folder / "checkpoint" / "run.json").is_file():
        return "finished" if RunFolder(folder).is_finished else "before training"
    lines = log.read_text().splitlines()
    if lines and '"kept"' in lines[-1]:
        return "certifying"
    return f"{json.loads(lines[-1])['stage']} {json.loads(lines[-1])['update']}" if lines else "at the start"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What comes of the run when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_to_the_end(folder)
    return contents(folder)


def kill_now_and_then(root, kills, seed, whole):
    """Runs, killed `kills` times in all at random moments, each of which must end as the undisturbed one."""
    draw, moments, runs = random.Random(seed), [], 0
    while len(moments) < kills:
        folder, runs = root / f"run-{runs}", runs + 1
        while len(moments) < kills and not RunFolder(folder).is_finished:
            in_save = draw.randint(1, 3) if draw.random() < 0.3 else 0
            process, patience = started(folder, in_save), draw.uniform(0.2, 12.0)
            process.join(60 if in_save else patience)
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            if process.exitcode:
                moments.append(("saving, after " if in_save else "") + moment(folder))
        run_to_the_end(folder)
        assert contents(folder) == whole
    return moments


def test_killed_in_the_middle_of_a_save_and_at_a_random_moment(tmp_path, whole):
    folder, draw = tmp_path / "run", random.Random()
    process = started(folder, killed_in_save=draw.randint(1, 4))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((folder / "checkpoint").glob(".*.part*")), "half a file"
    after = draw.randint(8, 24)
    process = started(folder)
    while process.is_alive() and len((folder / "progress.jsonl").read_text().splitlines()) < after:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.3))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not RunFolder(folder).is_finished
    run_to_the_end(folder)
    assert contents(folder) == whole


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, whole):
    moments = kill_now_and_then(tmp_path, 20, random.SystemRandom().randrange(2**32), whole)
    print("\n".join(moments))
    assert len(moments) >= 20
