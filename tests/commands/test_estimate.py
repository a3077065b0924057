"""What is said of a training before it starts is what then happens."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ctrl_diffusion.commands.jobs import estimate
from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.commands.jobs.estimate import estimate_job, evaluations_of_samples, few_images, probes_of
from ctrl_diffusion.commands.jobs.inspect import evaluations
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.reward.classifiers import fit_panel
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.measure import STRENGTHS, evaluate, prior_samples, probe, step_counts, sweep
from ctrl_diffusion.run.prepare import prepare
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.run.stages import train

FAST = {"head": "ordinal", "grid": 1, "depth": 1, "updates": 150}
TINY = {
    "prior": "digits", "control": "ink", "classifier": FAST, "steps": 2, "rank": 4, "learners": ["weighted", "adjoint"],
    "weighted": {"updates": 6, "batch": 16, "cache": 8, "renoising": 3},
    "adjoint": {"updates": 8, "batch": 8, "reuse": 2},
    "evaluation": {"prior_samples": 8, "paths": 80, "probes": 2, "sweep_paths": 80},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_imagefolder(folder, labelled_digits("ink", 0)[0][0])
    return folder


@pytest.fixture(scope="module")
def panel(data):
    """p̂ of it."""
    job = prepare({**TINY, "data": str(data)})
    return fit_panel(job.inputs[0].data, "ink", ruler=True, settings=job.config.controls[0].classifier)[0]


def test_a_dry_run_says_what_a_training_takes_and_writes_nothing(data, tmp_path, ctrl_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**TINY, "data": str(data)}))
    done = ctrl_here("train", "--config", "mine.yaml", "--dry-run", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    parts = "re-noising", "weighted", "adjoint", "evaluations", "activations"
    for words in (*parts, "an update     at most", "total, at most", "nothing was written"):
        assert words in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    refused = ctrl_here("train", "--config", "mine.yaml", "--dry-run", "--classifier", "nowhere")
    assert refused.returncode == 2
    assert "nowhere" in refused.stderr


def test_its_parts_are_the_whole(data):
    found = estimate_job({**TINY, "data": str(data), "learners": ["weighted", "adjoint", "adjoint"]})
    assert list(found["stages"]) == ["re-noising", "weighted", "adjoint"]
    assert [stage["updates"] for stage in found["stages"].values()] == [3, 6, 16]
    said = evaluations(Config.from_values({**TINY, "data": "-"}))
    assert found["stages"]["weighted"]["evaluations"] == list(said["weighted"]) == [2, 1]
    seconds, memory = found["seconds"], found["memory_mb"]
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert memory.pop("all") == pytest.approx(sum(memory.values()))


def test_classifiers_are_tried_on_some_images_of_every_class():
    y, c = torch.zeros(6000).long(), torch.arange(6000) % 10
    y[:12] = 1  # a rare class is there whole
    data = LabelledImages(torch.zeros(6000, 1, 1, 1), {"y": y, "c": c}, {"y": ("a", "b"), "c": tuple("0123456789")})
    few = few_images(data, ["y", "c"])
    assert few.labels["y"].bincount()[1] == 12
    assert (few.labels["c"].bincount() >= 200).all()
    assert len(few) < 4000
    assert few_images(data[torch.arange(3000)], ["y", "c"]).x.shape[0] == 3000
    many = LabelledImages(torch.zeros(6000, 1), {"y": torch.arange(6000) % 300}, {"y": tuple(map(str, range(300)))})
    assert (few_images(many, ["y"]).labels["y"].bincount() == 10).all(), "as few as a class may have"


def test_what_takes_its_time_is_extrapolated(data, monkeypatch):
    """On a clock that fits advance: 7 seconds and 0.5 an update, and every learner's first batch is a slow one."""
    now = 0.0
    fit_panel, train = estimate.fit_panel, estimate.train

    def advance(seconds):
        nonlocal now
        now += seconds

    def fitted(*given, **options):
        advance(7 + 0.5 * given[4].updates)
        return fit_panel(*given, **options)

    def trained(*given):
        for record in train(*given):
            if "loss" in record:
                slow = record["update"] <= (2 if record["stage"] == "adjoint" else 1)
                advance({"re-noising": 1, "weighted": 2, "adjoint": 3}[record["stage"]] * (10 if slow else 1))
            yield record

    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(estimate, "fit_panel", fitted)
    monkeypatch.setattr(estimate, "train", trained)
    found = estimate_job({**TINY, "data": str(data)})
    assert found["seconds"]["classifiers"] == pytest.approx(7 + 0.5 * FAST["updates"])
    assert found["seconds"]["learners"] == pytest.approx(3 * 1 + 6 * 2 + 8 * 3)


@pytest.mark.parametrize(("updates", "probes"), [(1, 3), (5, 1), (9, 4), (10, 4), (7, 20)])
def test_the_probes_said_are_those_made(data, panel, updates, probes):
    evaluation = {**TINY["evaluation"], "probes": probes}
    weighted = {**TINY["weighted"], "updates": updates, "batch": 4}
    job = prepare({**TINY, "data": str(data), "weighted": weighted, "learners": ["weighted"], "evaluation": evaluation})
    run = Run.start(job.config, job.prior, {"ink": panel})
    made = sum("J" in record and "kept" not in record for record in train(run))
    assert probes_of(run, job.config) == made


@pytest.mark.parametrize("gammas", [None, [0.5, 1, 2]])
@pytest.mark.filterwarnings("ignore:log Z")
def test_the_evaluations_of_samples_are_those_made(digits, gammas):
    """Rows that go through the network while samples, probes and certificate are drawn."""

    class Even:
        """p̂ that knows nothing."""

        conditional, latent = False, False

        def __init__(self, classes):
            self.classes = classes

        def log_prob(self, x):
            return torch.zeros(len(x), self.classes).log_softmax(1)

        def to(self, device):
            return self

    settings = {"data": "-", "classes": [3, 7], "learners": ["weighted", "adjoint"], "gammas": gammas}
    config = Config.from_values({**TINY, **settings})
    names = ("ink", "slant")
    config = config.with_(controls=[config.controls[0].model_dump() | {"name": name, "ruler": name} for name in names])
    values = {name: rulers.VALUES[name] for name in names}
    panels = {name: Panel(name, LabelSpace(values[name]), (1, 8, 8), Even(len(values[name])), None) for name in names}
    run = Run.start(config, digits, panels)
    with torch.no_grad():  # a control that does nothing is not evaluated
        for p in run.policy.trainable():
            p.add_(0.01)
    rows = 0

    def count(module, args, kwargs):
        nonlocal rows
        rows += len(args[0])

    def made(what):
        nonlocal rows
        rows = 0
        what()
        return rows

    handle = digits.denoiser.network.register_forward_pre_hook(count, with_kwargs=True)
    said = evaluations_of_samples(run, config)
    assert made(lambda: prior_samples(run, run.conditions, config.weighted.cache, "cache")) == said["cache"]
    assert probes_of(run, config) * made(lambda: probe(run, -(-160 // run.training_conditions.pairs))) == said["probes"]
    certified = made(lambda: evaluate(run, config.evaluation.paths, against_untrained=True))
    assert certified == said["log Z"] + said["certificate"]
    swept = made(lambda: sweep(run, STRENGTHS, step_counts(run), config.evaluation.sweep_paths))
    assert swept == said["strengths and step counts"]
    handle.remove()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A pipeline whose activations are more than the rest of the process."""
    folder = tmp_path_factory.mktemp("wide")
    unet = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(clip_sample=False)).save_pretrained(folder / "prior")
    x, y = torch.rand(80, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 2
    x[y == 1] = x[y == 1] / 2
    write_imagefolder(folder / "data", LabelledImages(2 * x - 1, {"dark": y}, {"dark": ("no", "yes")}))
    return folder


def program(body):
    """Run lines in a process of its own; the JSON they print."""
    lines = ["import json", "from ctrl_diffusion.commands.jobs.estimate import estimate_job, most_needed", body]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["adjoint", "backprop", "ppo", "weighted"])
def test_the_memory_said_is_within_a_fifth_of_what_is_needed(wide, learner, tmp_path):
    settings = {
        "prior": str(wide / "prior"), "data": str(wide / "data"), "control": "dark", "steps": 4, "rank": 8,
        "classifier": {"head": "categorical", "grid": 1, "updates": 200}, "learners": [learner],
        "weighted": {"updates": 6, "batch": 72, "cache": 60, "renoising": 2},
        "adjoint": {"updates": 6, "batch": 24, "reuse": 2, "regressed": 3}, "backprop": {"updates": 6, "batch": 96},
        "ppo": {"updates": 6, "batch": 32, "reuse": 2, "surrogates": 3},
        "evaluation": {"prior_samples": 60, "paths": 20, "probes": 1, "sweep_paths": 4},
    }  # fmt: skip
    said = program(f"print(json.dumps(estimate_job({settings!r})['memory_mb']))")
    needed = program(
        "from ctrl_diffusion.commands.jobs.train import train_job\n"
        f"train_job({settings!r}, {str(tmp_path / 'run')!r})\n"
        "print(most_needed() / 1e6)"
    )
    assert said["all"] == pytest.approx(needed, rel=0.2)
    assert said["activations"] > 0.3 * needed, "else this would say little"
