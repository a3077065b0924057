"""What the operating system tells, and that one module alone asks it in ways that not every system has."""

import ast
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctrl_diffusion.system import machine

SOURCE = Path(machine.__file__).parents[1]
POSIX_MODULES = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "resource", "select", "syslog", "termios", "tty"}
POSIX_CALLS = {
    "os": {"chown", "fork", "forkpty", "getpgid", "getuid", "kill", "killpg", "mkfifo", "rename", "sched_getaffinity",
           "setsid", "symlink", "uname", "wait", "waitpid"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm", "pause", "setitimer"},
}  # fmt: skip


def posix_in(text):
    """What of a module's text not every system has: modules, calls, and paths of the system."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from {alias.name.partition(".")[0] for alias in node.names} & POSIX_MODULES
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {alias.name for alias in node.names} & POSIX_CALLS.get(node.module, set())
            yield from names | {node.module} & POSIX_MODULES
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in POSIX_CALLS.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Attribute) and node.attr in ("symlink_to", "hardlink_to"):
            yield node.attr
        elif isinstance(node, ast.Constant) and str(node.value).startswith(("/proc", "/sys", "/dev", "/tmp", "/etc")):
            yield node.value


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_one_module_alone_asks_what_only_some_systems_answer(path):
    found = set(posix_in(path.read_text(encoding="utf-8")))
    assert bool(found) == (path == Path(machine.__file__)), found


@pytest.mark.parametrize("text", ["import fcntl", "from os import fork", "os.kill(1, 2)", "open('/proc/stat')"])
def test_such_calls_are_found(text):
    assert list(posix_in(text))


@pytest.fixture
def windows(monkeypatch):
    """A system without affinity, /proc and `resource`."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "STATUS", Path("nowhere"))
    monkeypatch.setitem(sys.modules, "resource", None)
    return monkeypatch


def test_where_posix_is_missing_the_rest_is_asked(windows):
    windows.setattr(os, "cpu_count", lambda: 6)
    assert machine.cores() == 6
    peaks = SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7)))
    windows.setitem(sys.modules, "psutil", peaks)
    assert machine.most_needed() == 7
    peaks.Process = lambda: SimpleNamespace(memory_info=SimpleNamespace)
    assert machine.most_needed() == 0


def test_the_peak_grows_with_what_is_held():
    before = machine.most_needed()
    held = bytearray(before)  # as much again
    held[::4096] = b"\1" * len(held[::4096])
    assert machine.most_needed() > before


def test_memory_and_disk_are_what_the_system_says(tmp_path, monkeypatch):
    free, whole = machine.memory()
    assert 0 < free <= whole
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=(5, path)))
    assert machine.free_disk(tmp_path / "not" / "yet") == (5, tmp_path)
    assert machine.cores() >= 1
