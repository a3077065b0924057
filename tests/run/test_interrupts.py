"""An interrupt or a signal, at any moment: one line says how to go on, and nothing is lost."""

import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from faults import SETTINGS, disturbed, interrupted_at, log

from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.run.folder import RunFolder
from ctrl_diffusion.system.checkpoint import Checkpoints
from ctrl_diffusion.system.folders import LOCK
from ctrl_diffusion.system.progress import Interrupted


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


@pytest.mark.parametrize(
    ("patience", "ends", "points"),
    [
        (4, 10, (4, 9)),  # before the decay, in it
        (1, 5, (4, 5)),
        pytest.param(4, 10, range(1, 11), marks=pytest.mark.slow),
        pytest.param(1, 5, range(1, 6), marks=pytest.mark.slow),
    ],
)
def test_a_learner_that_follows_its_probes_goes_on_from_any_update(
    begin, trained, monkeypatch, tmp_path, patience, ends, points
):
    """Whether its limit or a plateau lets its rate decay; the state says so. Four intervals take all ten updates."""
    rate = 1e-3 if ends == 10 else 1e-12
    adjoint = {"updates": 10, "batch": 8, "reuse": 1, "lr_embedding": rate, "lr_adapter": rate}
    settings = {"learners": ["adjoint"], "decay": "probes", "patience": patience, "checkpoint": 1, "adjoint": adjoint}
    settings |= {"evaluation": {**SETTINGS["evaluation"], "probes": 5}}
    begin(whole := tmp_path / "whole", {**SETTINGS, **settings})
    runs = {at: shutil.copytree(whole, tmp_path / f"{at}") for at in points}
    (averaged,) = [record for record in trained(whole) if "averaged" in record and "kept" not in record]
    assert (averaged["update"], averaged["decay_from"]) == (ends, 8 if ends == 10 else 4)
    begins = set()
    for at, run in runs.items():
        with monkeypatch.context() as patch:
            disturbed(patch, interrupted_at(at))
            with pytest.raises(Interrupted):
                trained(run)
        _, about = Checkpoints(run / "checkpoint").newest() or ({}, {"decay": None})
        begins.add(about["decay"] and about["decay"][0])
        trained(run)
        assert log(run) == log(whole)
    assert begins == {None, averaged["decay_from"]}


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
    told = [line for line in err.splitlines(keepends=True) if "weighted learns from a handful of 8" not in line]
    assert "".join(told) == f"ctrl: interrupted. Everything is saved; go on with: ctrl train --resume {run}\n"
    assert list((run / "checkpoint").glob("*.safetensors"))
    assert not (run / LOCK).exists()
    trained(run)
    assert log(run) == undisturbed


def test_a_signal_before_p_is_fitted_leaves_nothing(begun, ctrl_here, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "fit_panel", stopped)
    done = ctrl_here("train", "--config", begun / "config.yaml", "--out", tmp_path / "runs" / "new")
    assert done.returncode == 130
    assert done.stderr.endswith("ctrl: interrupted before training began: the same command begins again.\n")
    assert not (tmp_path / "runs").exists()
