import os

os.environ["OMP_NUM_THREADS"] = "1"  # two test workers share two cores; inherited by the command lines we start
os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from ctrl_diffusion.commands.app import main
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS

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


def exit_code(*arguments: object) -> int:
    """Run the command line in this process: the same entry point without the seconds of its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ctrl", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture
def ctrl_here(capsys):
    """Run the command line in this process; its exit code and what it printed."""

    def call(*arguments: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(arguments, exit_code(*arguments), *capsys.readouterr())

    return call


# a smoke test's smoke test: what p̂ and the control learn of it is enough for every test that looks at them
QUICKER = "steps: 6\nclassifier: {updates: 3000}\nweighted: {batch: 64}\nadjoint: {batch: 40}\n"


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """Make a folder of some name, once for all workers; no test may change it."""
    root = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, ready = root / name, root / f"{name}.ready"
        with FileLock(root / f"{name}.lock"):
            if not ready.exists():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    make(folder)
                ready.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def quick_run(once, tmp_path_factory) -> Path:
    """A run folder made by the command line."""
    settings = tmp_path_factory.mktemp("quick") / "settings.yaml"
    settings.write_text(QUICKER)

    def demo(folder: Path) -> None:
        assert exit_code("demo", "--quick", "--out", folder, "--overwrite", "--config", settings) == 0

    return once("quick-run", demo)
