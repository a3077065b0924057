"""A package of one's own adds one of each kind by a file and a row, without changing ours."""

import json
import math
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import Field
from torch import nn

from ctrl_diffusion import LabelledImages, Prior, Run, train_job
from ctrl_diffusion.chain.codec import Codec
from ctrl_diffusion.commands.jobs.compare import compare_job
from ctrl_diffusion.commands.jobs.comparing.methods import METHODS, MethodSpec
from ctrl_diffusion.control.control import Control, read_about
from ctrl_diffusion.control.kinds import KINDS, load_control
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.digits import digits, ink_ruler
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.evaluate.rulers.table import RULERS, Ruler
from ctrl_diffusion.guide.method import Method
from ctrl_diffusion.learn.step import Evaluations, Learner, LearnerSettings, Step
from ctrl_diffusion.learn.table import LEARNERS
from ctrl_diffusion.prior.families import FAMILIES
from ctrl_diffusion.prior.family import Family
from ctrl_diffusion.prior.network import ControlSite
from ctrl_diffusion.prior.source import DIGITS
from ctrl_diffusion.reward.heads import HEADS, Categorical
from ctrl_diffusion.system.files import read_tensors, write_tensors

TINY = {
    "prior": "digits", "control": "ink", "condition": "digit", "ruler": "ink", "classes": [3, 8], "steps": 2, "rank": 2,
    "classifier": {"updates": 150, "grid": 1, "depth": 1}, "learners": ["weighted"],
    "weighted": {"updates": 2, "batch": 8, "cache": 8, "renoising": 0},
    "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six hundred digits, with their ink."""
    folder = tmp_path_factory.mktemp("photos")
    x, c = (values[:600] for values in digits())
    names = {"digit": tuple("0123456789"), "ink": tuple("1234")}
    write_imagefolder(folder, LabelledImages(x, {"digit": c, "ink": ink_ruler(x)}, names))
    return str(folder)


@pytest.fixture
def row():
    """Add a row to a table for one test."""
    added = []

    def add(table, name, value):
        assert name not in table
        table[name] = value
        added.append((table, name))

    yield add
    for table, name in added:
        del table[name]


class Shrink(Learner):
    """Pull the control's parameters to zero, whatever the reward."""

    class Settings(LearnerSettings):
        updates: int = Field(2, ge=1)
        batch: int = Field(4, ge=1)
        weight: float = Field(0.5, gt=0)

        def evaluations(self, steps):
            return Evaluations(0, 0)

    def __call__(self, policy, reward, conditions, generator, carried=None):
        while True:
            loss = sum(p.square().sum() for p in policy.trainable())
            yield Step(self.settings.weight * loss, {"reward": 0.0})


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_learner(photos, tmp_path, row):
    row(LEARNERS, "shrink", Shrink)
    metrics = train_job({**TINY, "data": photos, "learners": ["shrink"], "shrink": {"weight": 2.0}}, tmp_path / "run")
    assert [stage["stage"] for stage in metrics["training"]["stages"]] == ["shrink"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["shrink"]["weight"] == 2.0
    with pytest.raises(ValueError, match="Did you mean shrink"):
        train_job({**TINY, "data": photos, "learners": ["shrimk"]}, tmp_path / "other")
    with pytest.raises(ValueError, match="wieght"):
        train_job({**TINY, "data": photos, "learners": ["shrink"], "shrink": {"wieght": 2.0}}, tmp_path / "other")


@pytest.mark.filterwarnings("ignore:log Z")
def test_the_learner_of_the_page_on_learners(photos, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "own-learner.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    for long, short in [
        ('"updates": 200', '"updates": 2, "batch": 8'),
        ("runs/demo/data", photos),
        ("runs/plain", "run"),
    ]:
        assert long in code
        code = code.replace(long, short)
    monkeypatch.chdir(tmp_path)
    names = {"TINY": TINY}
    try:
        exec(code.replace("train_job(settings |", "train_job(TINY | settings |"), names)
    finally:
        LEARNERS.pop("plain", None)
    assert [stage["stage"] for stage in names["metrics"]["training"]["stages"]] == ["plain"]


class Nudge(Control):
    """Add to x̂ an image for each class."""

    def __init__(self, name, values, denoiser, interval=None):
        super().__init__(name, values, interval=interval)
        self.table = nn.Embedding(self.size + 1, math.prod(denoiser.shape), padding_idx=self.size)
        nn.init.zeros_(self.table.weight)
        self._y = None
        denoiser.register_forward_hook(lambda module, args, x_hat: self._nudged(x_hat))

    def _nudged(self, x_hat):
        return x_hat if self._y is None else x_hat + self.embedded(self.table, self._y).view_as(x_hat)

    @contextmanager
    def active(self, y):
        self._y = y
        yield
        self._y = None

    def parameter_groups(self):
        return {"embedding": [self.table.weight], "adapter": []}

    def save(self, folder):
        write_tensors(folder / "control.safetensors", {"table": self.table.weight})
        self.write_about(folder, "nudge")

    @classmethod
    def load(cls, folder, denoiser):
        _, arguments = read_about(folder)
        control = cls(**arguments, denoiser=denoiser)
        control.table.weight.data = read_tensors(folder / "control.safetensors")["table"]
        return control


def test_a_control(tmp_path, row):
    row(KINDS, "nudge", Nudge)
    prior, again = (Prior.from_pretrained(DIGITS).denoiser for _ in range(2))
    control = Nudge("ink", "12", prior, interval=(0.1, 0.9))
    control.table.weight.data[1] = 1.0
    control.save(tmp_path)
    x_t, c, y = torch.zeros(3, *prior.shape), torch.tensor([3, 3, 3]), torch.tensor([0, 1, -1])
    policy = Policy(again, load_control(tmp_path, again))
    with torch.no_grad():
        x_hat, bare = policy(x_t, 0.5, c=c, labels={"ink": y}), prior(x_t, 0.5, c=c)
    assert torch.equal(x_hat[[0, 2]], bare[[0, 2]])
    assert torch.equal(x_hat[1], bare[1] + 1)
    assert policy.controls["ink"].interval == (0.1, 0.9)


def load(pipeline, size):
    network = pipeline.unet

    def call(x_t, timestep):
        return network(x_t, timestep, return_dict=False)[0]

    site = ControlSite(("time_embedding",), network.time_embedding.linear_2.out_features, ("to_q",), rank=2)
    return Family(network, call, Codec((1, 8, 8)), site)


def test_a_model_family(tmp_path, row):
    row(FAMILIES, "MyPipeline", SimpleNamespace(load=load, PARTS=("unet",), OPTIONAL=(), ALONE=True))
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    DDPMScheduler(clip_sample=False).save_pretrained(tmp_path / "scheduler")
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "MyPipeline", **parts}))
    prior = Prior.from_pretrained(tmp_path)
    assert (prior.pipeline, prior.image_shape) == ("MyPipeline", (1, 8, 8))
    assert prior.denoiser(torch.zeros(1, 1, 8, 8), 0.5).isfinite().all()


class Sharper(Categorical):
    """Read logits twice as large."""

    name = "sharper"

    def log_prob(self, score, temperature):
        return super().log_prob(2 * score, temperature)


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_kind_of_label(photos, tmp_path, row):
    row(HEADS, "sharper", Sharper)
    settings = {**TINY, "data": photos, "classifier": {**TINY["classifier"], "head": "sharper"}}
    train_job(settings, tmp_path / "run")
    assert isinstance(Run.load(tmp_path / "run").panels["ink"].classifier.head, Sharper)


@dataclass
class Blank(Method):
    """Draw nothing: x_0 is zero."""

    def sample(self, target, times, generator):
        return torch.zeros(len(target), *target.denoiser.shape)


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_baseline(photos, tmp_path, row):
    row(METHODS, "blank", MethodSpec("blank sheets", lambda models: Blank(), front=False))
    train_job({**TINY, "data": photos}, tmp_path / "run")
    comparison = compare_job(tmp_path / "run", tmp_path / "compared", methods=["ctrl", "blank"], n=8, strengths=(1.0,))
    diversity = {row["method"]: row["diversity_ratio"] for row in comparison["rows"] if not row["trial"]}
    assert diversity["blank"] == 0 < diversity["ctrl"]
    assert "blank sheets" in (tmp_path / "compared" / "report.html").read_text()


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_ruler(photos, tmp_path, row):
    """One that is told the digit, as it numbers digits itself."""
    told = []

    def label(x, c):
        told.extend(c.tolist())
        return ink_ruler(x)

    subjects = tuple("9876543210")
    row(RULERS, "told ink", Ruler("the ink", label, label, tuple("1234"), side=8, subjects=subjects))
    train_job({**TINY, "data": photos, "ruler": "told ink"}, tmp_path / "run")
    assert set(told) == {subjects.index("3"), subjects.index("8")}
    with pytest.raises(ValueError, match="must be one of ink, .*, told ink, got 'told inc'"):
        train_job({**TINY, "data": photos, "ruler": "told inc"}, tmp_path / "other")


def test_a_rule(photos, tmp_path, monkeypatch, ctrl_here):
    (tmp_path / "toy_rules.py").write_text(
        "import numpy as np\ndef heavy(image):\n    return 'yes' if np.asarray(image).mean() > 80 else 'no'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"classifier": TINY["classifier"]}))
    shutil.copytree(photos, tmp_path / "photos")
    done = ctrl_here(
        "classifier", "photos", "--control", "heavy:toy_rules:heavy", "--out", "out", "--config", "settings.yaml"
    )
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "out" / "classifier.json").read_text())
    assert (about["control"], about["values"]) == ("heavy", ["no", "yes"])
