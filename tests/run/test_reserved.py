"""Whose a folder is: other jobs, other files, runs that did and did not finish."""

import os

from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.run.folder import RUN_FILES, RunFolder
from ctrl_diffusion.system.folders import LOCK, locked


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
    assert done.stdout == f"{quick_run} is finished: there is nothing to go on with, unless you give it --time.\n"
    assert {path: path.stat().st_mtime_ns for path in quick_run.rglob("*") if path.is_file()} == before


def test_the_settings_go_first_when_a_run_is_cleared():
    """Cleared halfway, a folder must not be taken for the old run."""
    assert RUN_FILES[0] == "config.yaml"
