"""What may go wrong on the way: a training goes on, or says in one line what to do and loses nothing."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml

from ctrl_diffusion.commands.jobs import testbed
from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.jobs.train import resume_job
from ctrl_diffusion.control import lora
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward import scorer as classifier
from ctrl_diffusion.run import stages
from ctrl_diffusion.run.config import Config, check_code
from ctrl_diffusion.run.folder import RUN_FILES, RunFolder
from ctrl_diffusion.run.state import TrainingState
from ctrl_diffusion.system import checkpoint
from ctrl_diffusion.system.folders import LOCK, locked
from ctrl_diffusion.system.progress import Interrupted

SETTINGS = {
    "classifier": {"updates": 150, "head": "ordinal", "grid": 1, "depth": 1},
    "learners": ["weighted", "adjoint"],
    "weighted": {"updates": 4, "batch": 16, "cache": 8, "renoising": 0},
    "adjoint": {"updates": 8, "batch": 8, "reuse": 2},
    "evaluation": {"prior_samples": 8, "paths": 80, "probes": 1, "sweep_paths": 80},
    "steps": 2,
    "rank": 4,
    "checkpoint": 2,
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run folder whose training has not begun yet."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "finish_training", lambda *_: {})
        demo_job(SETTINGS, folder)
    return folder


@pytest.fixture
def run(begun, tmp_path):
    """A copy of it to train in."""
    return shutil.copytree(begun, tmp_path / "run")


@pytest.fixture
def trained(monkeypatch):
    """Go on with a run until it is trained; its records."""
    monkeypatch.setattr(job, "train_and_report", lambda run, folder, *rest: stages.train_in(folder, run, *rest)[0])
    return resume_job


@pytest.fixture(scope="module")
def undisturbed(begun, tmp_path_factory):
    """The log of a training that nothing happens to."""
    folder = shutil.copytree(begun, tmp_path_factory.mktemp("undisturbed") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "train_and_report", lambda run, folder, *rest: stages.train_in(folder, run, *rest)[0])
        resume_job(folder)
    return (folder / "progress.jsonl").read_bytes()


def log(folder):
    return (folder / "progress.jsonl").read_bytes()


def disturbed(monkeypatch, change):
    """Let `change`, of a number and a step, see every step of the adjoint learner."""
    learner_of, number = stages.learner_of, count(1)

    def changed(run, stage, phase):
        learner = learner_of(run, stage, phase)
        if stage != "adjoint":
            return learner
        return lambda *given: (change(next(number), step, learner) for step in learner(*given))

    monkeypatch.setattr(stages, "learner_of", changed)


def interrupted_at(at):
    def change(number, step, learner):
        if number == at:
            raise KeyboardInterrupt
        return step

    return change


@pytest.fixture
def interrupted(run, trained, monkeypatch):
    """A run in the middle of its second learner."""
    with monkeypatch.context() as patch:
        disturbed(patch, interrupted_at(6))
        with pytest.raises(Interrupted, match=r"interrupted\. Everything is saved; go on with: ctrl train --resume"):
            trained(run)
    return run


def with_settings(run, **settings):
    """Write other settings into a run's config."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))


def test_a_batch_of_paths_that_is_not_finite_is_left_out_and_counted(run, trained, monkeypatch):
    nan = {3, 4}  # both updates of the second batch of paths
    disturbed(monkeypatch, lambda n, step, _: replace(step, loss=step.loss * (math.nan if n in nan else 1.0)))
    records = [record for record in trained(run) if record["stage"] == "adjoint"]
    assert [record.get("skipped") for record in records if "kl" in record and "kept" not in record] == [
        None, None, 1, 2, 2, 2, 2, 2
    ]  # fmt: skip
    assert {record["skipped"] for record in records if "averaged" in record} == {2}
    assert all(json.loads(line) for line in log(run).splitlines()), "no NaN in the log"


def test_rewards_that_stay_not_finite_stop_the_learner_and_the_last_good_control_is_kept(run, trained, monkeypatch):
    config = yaml.safe_load((run / "config.yaml").read_text())
    often = {"evaluation": {**config["evaluation"], "probes": 4}, "max_skipped": 1}
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **often}))
    disturbed(monkeypatch, lambda n, step, _: replace(step, loss=step.loss * (math.inf if n > 4 else 1.0)))
    *_, stopped, kept = trained(run)
    assert stopped["stopped"].startswith("diverged: the loss of update 8 is inf, as in 1 batches before it")
    assert kept["kept"]
    assert math.isfinite(kept["J"])


def test_out_of_memory_halves_the_micro_batch_once(run, trained, monkeypatch, undisturbed):
    def full(number, step, learner):
        if (learner.micro or 8) > 4 and number == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step

    disturbed(monkeypatch, full)
    with pytest.warns(RuntimeWarning, match="training goes on with micro_batch 4 instead of 8"):
        records = trained(run)
    assert Config.read(run / "config.yaml").micro_batch == 4
    # the same training, but for rounding: nothing twice, nothing missing
    before = [json.loads(line) for line in undisturbed.splitlines()]
    assert [(r["stage"], r["update"]) for r in records] == [(r["stage"], r["update"]) for r in before]
    assert [r.get("loss", 0.0) for r in records] == pytest.approx([r.get("loss", 0.0) for r in before], rel=1e-2)


def test_out_of_memory_for_all_that_says_what_to_turn_down(run, trained, monkeypatch):
    def full(number, step, learner):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    disturbed(monkeypatch, full)
    with (
        pytest.warns(RuntimeWarning, match="micro_batch 4"),
        pytest.raises(MemoryError, match=r"turn down micro_batch \(now 4\) or batch, or set .*--resume") as caught,
    ):
        trained(run)
    assert "\n" not in str(caught.value)


def no_room(at):
    """Writing of states where there is no room for all of the `at`-th: the system itself refuses."""
    saves, write = count(1), checkpoint.write_tensors

    def full(*arguments):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if next(saves) == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    return full


@pytest.mark.parametrize("at", [4, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2, 7))])
def test_a_full_disk_costs_nothing_but_a_second_start(run, trained, monkeypatch, undisturbed, at):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", no_room(at))
        with pytest.raises(OSError, match=r"File too large\. What is saved is whole; .*--resume") as caught:
            trained(run)
    assert "\n" not in str(caught.value)
    states = list((run / "checkpoint").iterdir())
    assert len(states) == 1 + 2 * min(at - 1, 2), "the last ones are there, and no half"
    trained(run)
    assert log(run) == undisturbed


def flip(path):
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 1
    path.write_bytes(text)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "states"),
    [(flip, 1), (cut, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((Path.unlink, 1), (flip, 2)))],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(interrupted, trained, undisturbed, damage, states):
    newest = sorted((interrupted / "checkpoint").glob("*.safetensors"))
    assert len(newest) == 2
    for path in newest[-states:]:
        damage(path)
    with pytest.warns(UserWarning, match=r"is damaged \(.*\): training goes on from before it"):
        trained(interrupted)
    assert log(interrupted) == undisturbed


def test_a_state_that_cannot_be_read_is_not_a_damaged_one(interrupted, trained, monkeypatch, undisturbed):
    states = set((interrupted / "checkpoint").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256", refused)
        with pytest.raises(OSError, match=r"Permission denied.*go on with: ctrl train --resume"):
            trained(interrupted)
    assert set((interrupted / "checkpoint").iterdir()) == states
    trained(interrupted)
    assert log(interrupted) == undisturbed


def refused(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.mark.parametrize("part", [classifier, lora])
def test_weights_that_may_not_be_read_are_not_damaged_ones(ctrl_here, quick_run, monkeypatch, tmp_path, part):
    monkeypatch.setattr(part, "read_tensors", refused)
    done = ctrl_here("sample", quick_run, "--out", tmp_path / "out", "--quiet")
    assert (done.returncode, done.stderr.startswith("ctrl: [Errno 13] Permission denied")) == (2, True)


def test_what_was_learned_for_other_settings_is_not_gone_on_with(interrupted, trained):
    with_settings(interrupted, rank=2, steps=3, micro_batch=4)
    with pytest.raises(ValueError, match=r"config\.yaml: steps was 2 and is 3; rank was 4 and is 2\. Put it back"):
        trained(interrupted)
    with_settings(interrupted, rank=4, steps=2)
    assert trained(interrupted)[-1]["kept"]


def test_another_precision_begins_with_its_own_scale(interrupted, monkeypatch):
    """float32 has saved a scale of one, in which float16 would lose small gradients."""
    with_settings(interrupted, mixed_precision="fp16")

    def scale(run, folder, *_):
        assert TrainingState.from_checkpoints(run, folder.checkpoints).best.record
        return run.policy.base.loss_scale

    monkeypatch.setattr(job, "train_and_report", scale)
    assert resume_job(interrupted) == 2**10


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory"])
def test_memory_is_short_in_many_words(monkeypatch, ctrl_here, tmp_path, text):
    def fails(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(testbed, "exact_job", fails)
    done = ctrl_here("exact", "--out", tmp_path / "exact")
    assert (done.returncode, done.stderr.split(".")[0]) == (2, "ctrl: out of memory")


def test_an_interrupt_while_the_folder_is_laid_out_says_what_begins_again(monkeypatch, ctrl_here, tmp_path):
    """What stands there by then is in the way of the same command."""
    run = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "write_classifier_report", stopped)
    done = ctrl_here("demo", "--config", tmp_path / "tiny.yaml", "--quiet", "--out", run)
    assert (done.returncode, "the same command with --overwrite begins again" in done.stderr) == (130, True)
    with pytest.raises(ValueError, match="--overwrite"):
        RunFolder(run).check_free(overwrite=False)
    RunFolder(run).check_free(overwrite=True)


def test_what_comes_after_a_signal_is_what_would_have_come(run, trained, monkeypatch, undisturbed):
    """At each update in turn."""
    with monkeypatch.context() as patch:
        for at in (1, 2, 3, 4):
            disturbed(patch, interrupted_at(at))
            with pytest.raises(Interrupted):
                trained(run)
    trained(run)
    assert log(run) == undisturbed


def cli(*arguments):
    command = [sys.executable, "-m", "ctrl_diffusion", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_130(run, trained, undisturbed, sent):
    process = cli("train", "--resume", run, "--quiet")
    while process.poll() is None and log(run).count(b"\n") < 5:
        time.sleep(0.01)
    process.send_signal(sent)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert err == f"ctrl: interrupted. Everything is saved; go on with: ctrl train --resume {run}\n"
    assert list((run / "checkpoint").glob("*.safetensors"))
    assert not (run / LOCK).exists()
    trained(run)
    assert log(run) == undisturbed


def test_a_signal_before_p_is_fitted_leaves_nothing(begun, ctrl_here, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "fit_panel", stopped)
    done = ctrl_here("train", "--config", begun / "config.yaml", "--out", tmp_path / "runs" / "new")
    assert done.returncode == 130
    assert done.stderr.endswith("ctrl: interrupted before training began: the same command begins again.\n")
    assert not (tmp_path / "runs").exists()


def test_two_runs_in_one_folder(run, ctrl_here):
    with locked(run):
        for asked in (
            ["--resume", run],
            ["--prior", "digits", "--data", "x", "--control", "ink", "--out", run, "--overwrite"],
        ):
            done = ctrl_here("train", *asked)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert f"ctrl: another job (process {os.getpid()}) is writing {run}" in done.stderr


def test_a_folder_that_only_a_killed_job_was_in_is_free(tmp_path):
    (tmp_path / LOCK).write_text("1\n")
    with job.reserved(RunFolder(tmp_path), overwrite=False):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / LOCK).exists()


def test_a_run_that_did_not_finish_is_not_begun_again_by_mistake(run, ctrl_here):
    done = ctrl_here("demo", "--out", run)
    assert done.returncode == 2
    assert f"did not finish. Go on with it by ctrl train --resume {run}, or pass --overwrite" in done.stderr


def test_a_folder_that_cannot_be_written(run, ctrl_here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    for asked in (["--resume", run], ["--config", run / "config.yaml", "--out", run / "other"]):
        done = ctrl_here("train", *asked)
        assert done.returncode == 2
        assert done.stderr.endswith("cannot be written to. Choose another --out.\n")
        assert done.stderr.count("\n") == 1


def test_a_finished_run_is_left_as_it_is(ctrl_here, quick_run):
    before = {path: path.stat().st_mtime_ns for path in quick_run.rglob("*") if path.is_file()}
    done = ctrl_here("train", "--resume", quick_run)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{quick_run} is finished: there is nothing to go on with.\n"
    assert {path: path.stat().st_mtime_ns for path in quick_run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "{tmp}/missing"], "has no run to go on with: it has no config.yaml"),
        (["--resume", "{run}", "--seed", "0"], "--resume takes everything from"),
        (["--resume", "{run}", "--out", "{tmp}/other"], "Leave the other options out."),
        (["--prior", "digits"], "--out is missing"),
    ],
)
def test_what_cannot_be_resumed(ctrl_here, begun, tmp_path, arguments, message):
    done = ctrl_here("train", *(text.format(tmp=tmp_path, run=begun) for text in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_killed_before_p_was_whole_it_is_fitted_again(begun, run, monkeypatch):
    (run / "checkpoint" / "run.json").unlink()
    (run / "classifier" / "classifier.safetensors").unlink()
    (run / "classifier" / ".classifier.json.part.json").write_text("{")
    monkeypatch.setattr(job, "finish_training", lambda *_: {})
    resume_job(run)
    for name in ("classifier/classifier.safetensors", "config.yaml", "data/metadata.csv"):
        assert (run / name).read_bytes() == (begun / name).read_bytes()
    assert not list(run.rglob(".*"))
    # the rule that made the labels is run again, and the command line does not name it
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["controls"][0]["column"] = "somebodys:label"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "checkpoint" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml runs code: somebodys:label\. If you know it, pass --trust"):
        resume_job(run)


def test_the_settings_go_first_when_a_run_is_cleared():
    """Cleared halfway, a folder must not be taken for the old run."""
    assert RUN_FILES[0] == "config.yaml"


MINE = "def label(image):\n    open('ran', 'w').close()\n    return 1\n"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module of somebody's beside which the command runs."""
    (tmp_path / "somebodys.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {"control": "light:somebodys:label"},
        {"control": "light", "column": "somebodys:label"},
        {"controls": [{"name": "light", "column": "somebodys:label", "data": "x"}]},
        {"control": "light", "condition": "c:somebodys:label"},
        {"control": "light", "classifier": {"factory": "somebodys:label"}},
    ],
)
def test_code_that_a_config_names_is_not_run_unless_it_is_trusted(code, ctrl_here, begun, settings):
    (code / "theirs.yaml").write_text(yaml.safe_dump({"prior": "digits", "data": str(begun / "data"), **settings}))
    asked = ["train", "--config", "theirs.yaml", "--out", "out"]
    done = ctrl_here(*asked)
    message = "ctrl: theirs.yaml runs code: somebodys:label. If you know it, pass --trust.\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert not (code / "ran").exists()
    if "classifier" not in settings and "condition" not in settings:
        assert "of ctrl" not in (done := ctrl_here(*asked, "--trust")).stderr
        assert "A control needs two classes" in done.stderr
        assert (code / "ran").exists()


def test_code_that_the_command_line_names_is_run(code, ctrl_here, begun):
    (code / "theirs.yaml").write_text(yaml.safe_dump({"prior": "digits", "data": str(begun / "data")}))
    named = ["--control", "light:somebodys:label", "--config", "theirs.yaml", "--out", "out"]
    assert "A control needs two classes" in ctrl_here("train", *named).stderr
    (code / "ran").unlink()
    assert "A control needs two classes" in ctrl_here("classifier", begun / "data", *named).stderr
    assert (code / "ran").exists()


def test_rules_of_ours_and_columns_need_no_trust(tmp_path):
    for column in ("ctrl_diffusion.data.rules:jpeg_size", "grey", "tags=hat"):
        check_code({"control": f"size:{column}", "data": "x"}, {}, False, tmp_path)
    for settings in ({"controls": [3]}, {"controls": {}}, {"classifier": 3}, [], {"control": None}):
        check_code(settings, {}, False, tmp_path)  # what is wrong with them is said elsewhere


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "add", "compare"])
def test_code_that_a_run_names_is_not_run_unless_it_is_trusted(code, ctrl_here, quick_run, command):
    theirs = shutil.copytree(quick_run, code / "theirs")
    about = theirs / "classifier" / "classifier.json"
    own = {"factory": "somebodys:label", "classes": 4, "input": [1, 8, 8], "balanced": False}
    about.write_text(json.dumps({**json.loads(about.read_text()), "kind": "Own", "shape": own}))
    asked = {"add": ["--data", "x", "--control", "y", "--out", "out"], "export": ["out"], "evaluate": []}
    asked = [command, theirs, *asked.get(command, ["--out", "out"])]
    done = ctrl_here(*asked)
    assert done.returncode == 2
    assert done.stderr.endswith("runs code: p̂ is made by somebodys:label. If you know it, pass --trust (trust=True).\n")
    assert not (code / "ran").exists()
    assert "somebodys:label" in ctrl_here(*asked, "--trust").stderr, "which makes no network"
    assert not (code / "out").exists()


def test_a_prior_that_is_a_pickle_is_not_loaded(tmp_path):
    from ctrl_diffusion.prior.prior import DIGITS

    folder = shutil.copytree(DIGITS, tmp_path / "digits")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    torch.save({}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded: .*safetensors"):
        Prior.from_pretrained(folder)
