import os

os.environ["OMP_NUM_THREADS"] = "1"  # two test workers share two cores; inherited by the command lines we start
os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from ctrl_diffusion.commands.app import main
from ctrl_diffusion.prior.prior import DIGITS, Prior

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that need the quick run come first and so to one worker: the other need not wait until it is there."""
    waiting = {item.path for item in items if "quick_run" in item.fixturenames}
    items.sort(key=lambda item: item.path not in waiting)


@pytest.fixture
def digits() -> Prior:
    """A fresh copy of the embedded prior: controls attach to it."""
    return Prior.from_pretrained(DIGITS)


@pytest.fixture(scope="session")
def ctrl():
    """Run the command line in a process of its own."""

    def call(*arguments: object, timeout: int = 600) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ctrl_diffusion", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return call


@pytest.fixture
def ctrl_here(monkeypatch, capsys):
    """Run the command line in this process: the same entry point without the seconds of its imports."""

    def call(*arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["ctrl", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def quick_run(ctrl, tmp_path_factory, worker_id) -> Path:
    """A run folder made by the command line, once for all workers; no test may change it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "quick"
    with FileLock(f"{folder}.lock"):
        if not (folder / "report.html").is_file():  # what is written last
            settings = folder.with_suffix(".yaml")
            settings.write_text("steps: 10\n")  # half the demo's: what uses this run takes half as long
            done = ctrl("demo", "--quick", "--out", folder, "--overwrite", "--config", settings)
            assert done.returncode == 0, done.stderr
    return folder
