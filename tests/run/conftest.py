"""Runs to train, undisturbed and interrupted."""

import shutil

import pytest
from faults import SETTINGS, disturbed, interrupted_at, log

from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.commands.jobs.train import resume_job
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel
from ctrl_diffusion.run import stages
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.progress import Interrupted


@pytest.fixture(scope="session")
def panel():
    """p̂ of ink, fitted for a moment."""
    data = labelled_digits("ink", 0)[0][0]
    fitting = ClassifierSettings(head="ordinal", grid=1, depth=1, updates=150)
    return fit_panel(data, "ink", ruler=True, settings=fitting)[0]


@pytest.fixture
def start_ink(digits, panel):
    """Begin a run of an untrained control of ink with settings of the control and of the run."""

    def start(control=None, **values):
        control = {"name": "ink", "data": "-", "ruler": "ink", **(control or {})}
        settings = {"prior": "digits", "controls": [control], "classes": [3, 5], "rank": 2, **values}
        return Run.start(Config.from_values(settings), digits, {"ink": panel})

    return start


def only_train(run, folder, *rest):
    """Train as a job would, without what comes after it; the records."""
    return stages.train_in(folder, run, *rest)[0]


@pytest.fixture(scope="session")
def begin():
    """Make a run folder whose training has not begun yet."""

    def make(folder, settings=SETTINGS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "finish_training", lambda *_: {})
            demo_job(settings, folder)

    return make


@pytest.fixture(scope="session")
def begun(begin, once):
    """A run folder whose training has not begun yet."""
    return once("begun", begin)


@pytest.fixture
def run(begun, tmp_path):
    """A copy of it to train in."""
    return shutil.copytree(begun, tmp_path / "run")


@pytest.fixture
def trained(monkeypatch):
    """Go on with a run until it is trained; its records."""
    monkeypatch.setattr(job, "train_and_report", only_train)
    return resume_job


@pytest.fixture(scope="session")
def undisturbed(begun, once):
    """The log of a training that nothing happens to."""

    def train(folder):
        shutil.copytree(begun, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "train_and_report", only_train)
            resume_job(folder)

    return log(once("undisturbed", train))


@pytest.fixture(scope="session")
def halfway(begun, once):
    """A run in the middle of its second learner."""

    def train(folder):
        shutil.copytree(begun, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "train_and_report", only_train)
            disturbed(patch, interrupted_at(6))
            with pytest.raises(
                Interrupted, match=r"interrupted\. Everything is saved; go on with: ctrl train --resume"
            ):
                resume_job(folder)

    return once("halfway", train)


@pytest.fixture
def interrupted(halfway, tmp_path):
    """A copy of it to go on with."""
    return shutil.copytree(halfway, tmp_path / "run")
