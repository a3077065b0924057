"""Runs that pages show, and a browser to look at them with; no test may change a run."""

import shutil
import socket
from importlib.util import find_spec

import pytest
import torch
from tiny import TINY

from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.jobs.train import train_job
from ctrl_diffusion.data.digits import digits
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.data.letters.sets import letters
from ctrl_diffusion.prior.prior import open_prior
from ctrl_diffusion.report.play.session import Session
from ctrl_diffusion.report.play.worker import Worker
from ctrl_diffusion.reward.classifiers import ClassifierSettings, fit_panel
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.folder import RunFolder
from ctrl_diffusion.run.run import INK, Run, configured
from tests.commands.conftest import both, finished  # noqa: F401 — fixtures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOW = "the page needs a browser: pip install -e '.[dev]' and apt-get install chromium"


@pytest.fixture(scope="session")
def scaled(once):
    """A tiny run whose control of ink is on a scale, without a ruler."""

    def train(root):
        x, c = (values[:400] for values in digits())
        ink = [f"{value:.4f}" for value in ((x + 1) / 2).flatten(1).mean(1).tolist()]
        values = tuple(dict.fromkeys(ink))
        numbers = torch.tensor([values.index(text) for text in ink])
        data = LabelledImages(x, {"digit": c, "ink": numbers}, {"digit": tuple("0123456789"), "ink": values})
        write_imagefolder(root / "data", data)
        given = {"prior": "digits", "data": str(root / "data"), "control": "ink", "condition": "digit", "kind": "scale"}
        enough = {"evaluation": {**TINY["evaluation"], "prior_samples": 18}}  # for nine levels
        train_job({**TINY, **given, **enough}, root / "run")

    return once("scaled", train) / "run"


@pytest.fixture(scope="session")
def other(once):
    """A tiny run of one control with the embedded one's name, for several γ."""
    return once("other-ink", lambda folder: demo_job({**TINY, "gammas": [1, 2], "learners": ["weighted"]}, folder))


@pytest.fixture(scope="session")
def lettered(once):
    """A run of weight and slant on the embedded letters: p̂ hardly fitted, adapters of noise, two steps, no metrics."""

    def make(folder):
        files, panels, few = RunFolder(folder), {}, ClassifierSettings(updates=20, grid=1, depth=1)
        rows = [{"name": name, "kind": "scale", "data": "-", "condition": "letter"} for name in ("weight", "slant")]
        config = Config.from_values({"prior": "letters", "classes": "all", "controls": rows, "steps": 2, "rank": 2})
        folder.mkdir()
        config.write(files.config)
        for name in config.names:
            x, _, y, _ = letters(name)
            space = LabelSpace.from_numbers(map(str, y.tolist()))
            data = LabelledImages(x, {name: space.places(y)}, {name: space.values})
            panels[name], _ = fit_panel(data, name, settings=few, check=False)
            panels[name].save(files.classifier(name))
        run = Run.start(config, configured(open_prior("letters"), config), panels)
        with torch.no_grad():
            for i, parameter in enumerate(run.policy.trainable()):
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        run.save_controls(files)

    return once("lettered", make)


@pytest.fixture
def worker():
    made = Worker()
    yield made
    made.close()


@pytest.fixture
def open_session(worker):
    """Open a run as a page does."""
    return lambda folder=INK: Session.load(folder, worker)


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def chromium():
    """A headless browser, or a skip that says how to get one."""
    if not (CHROMIUM and find_spec("playwright") and find_spec("gradio")):
        pytest.skip(HOW)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
