"""A folder is checked before it is written, locked while it is, and cleared of nothing else."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest

from ctrl_diffusion.system.folders import LOCK, check_file, check_output, clear, clear_unfinished, locked


def test_a_killed_job_leaves_no_lock(tmp_path):
    reading, writing = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        with locked(tmp_path / "run"):
            writing.send("in")
            time.sleep(60)
    assert reading.recv() == "in"
    with pytest.raises(ValueError, match=f"process {child}"), locked(tmp_path / "run"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run" / LOCK).is_file()
    with locked(tmp_path / "run"):
        pass


def test_where_a_file_system_has_no_locks_nobody_is_refused(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).is_file()


def test_a_second_job_is_refused_and_an_unused_folder_is_removed(tmp_path):
    with locked(tmp_path / "new" / "run"), pytest.raises(ValueError, match="another job"), locked(tmp_path / "new/run"):
        pass
    assert not (tmp_path / "new").exists(), "what was made and not used is gone again"


def test_a_folder_that_was_written_stays(tmp_path):
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "log").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log"]


@pytest.mark.parametrize(
    ("files", "overwrite", "message"),
    [
        (["notes"], False, "exists and is not empty. Choose another --out, or pass --overwrite."),
        (["notes"], True, "holds files but no result.json of ours to overwrite. Choose another --out."),
        (["result.json"], False, "exists and is not empty"),
        (["result.json", "notes"], True, None),
        ([LOCK], False, None),
        ([], False, None),
    ],
)
def test_only_files_of_an_earlier_job_are_overwritten(tmp_path, files, overwrite, message):
    for name in files:
        (tmp_path / name).touch()
    if message is None:
        return check_output(tmp_path, "result.json", overwrite)
    with pytest.raises(ValueError, match=message):
        check_output(tmp_path, "result.json", overwrite)


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file\. Choose another --out\."):
        check_output(tmp_path / "file" / "run", "result.json", overwrite=False)
    with pytest.raises(ValueError, match=r"is a folder\. Name a file with --out\."):
        check_file(tmp_path)
    check_file(tmp_path / "new" / "metrics.json")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(ValueError, match=r"cannot be written to\. Choose another --out\."):
        check_file(tmp_path / "new" / "metrics.json")


def test_clearing_removes_what_matches_and_no_more(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "cells")
    for name in ("a.png", "b.png", "notes", "cells/one", ".log.part.json"):
        (tmp_path / name).touch()
    clear_unfinished(tmp_path)
    assert not (tmp_path / ".log.part.json").exists()
    clear(tmp_path, ["linked"])
    assert (tmp_path / "cells" / "one").exists()
    clear(tmp_path, ["*.png", "cells", "missing"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    clear(tmp_path / "new", [])
    assert (tmp_path / "new").is_dir()
