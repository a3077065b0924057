"""Data whose condition is one of many prompts."""

import re
import shutil
import string
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from pipelines import saved

from ctrl_diffusion.chain.codec import Codec
from ctrl_diffusion.commands.jobs.comparing import comparison as comparison_room
from ctrl_diffusion.commands.jobs.comparing.comparison import Comparison, read_again
from ctrl_diffusion.commands.jobs.estimate import encoding_of
from ctrl_diffusion.commands.jobs.train import classifier_job, train_job
from ctrl_diffusion.control.conditions import ConditionSplit
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.data.names import in_order
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.reward.reward import Among
from ctrl_diffusion.reward.scorer import Classifier
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.measure import evaluate, on_prompts, prior_samples
from ctrl_diffusion.run.prepare import prepare
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.progress import JobOptions

# "day a", "day b", … and "night a", …: an image is as dark as is asked for in the first half, the reverse in the second
PROMPTS = [f"{word} {a}{b}" for word in ("day", "night") for a in string.ascii_lowercase for b in "abc"]
FAST = {"head": "categorical", "grid": 1, "depth": 1, "augment": "none", "updates": 200, "conditional": True}
TINY = {
    "steps": 3, "rank": 2, "guidance": 1.0, "learners": ["weighted"], "weighted": {"updates": 2, "cache": 8},
    "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "pipeline"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        saved("SD 1", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """300 images of 156 prompts, some once and none more than twice."""
    folder, generator = tmp_path_factory.mktemp("text") / "data", torch.Generator().manual_seed(0)
    c, dark = torch.arange(300) % len(PROMPTS), torch.randint(2, (300,), generator=generator)
    x = 0.2 * torch.randn(300, 3, 32, 32, generator=generator) + torch.where(dark == 1, -0.4, 0.4)[:, None, None, None]
    y = dark ^ (c >= len(PROMPTS) // 2).long()
    values = {"dark": ("no", "yes"), "prompt": tuple(PROMPTS)}
    write_imagefolder(folder, LabelledImages(x, {"dark": y, "prompt": c}, values))
    return folder


@pytest.fixture
def given(pipeline, data):
    def settings(**more):
        both = {"prior": str(pipeline), "data": str(data), "control": "dark", "condition": "prompt"}
        return {**both, "classifier": FAST, **TINY, **more}

    return settings


@pytest.fixture(scope="module")
def fitted(pipeline, data, tmp_path_factory):
    """A folder that `ctrl classifier` wrote."""
    folder = tmp_path_factory.mktemp("text") / "classifier"
    values = {"prior": "-", "data": str(data), "control": "dark", "condition": "prompt", "classifier": FAST}
    settings = Config.from_values(values).controls[0]
    return folder, classifier_job(settings, folder, str(pipeline))


def test_many_prompts_have_no_reader_and_no_table(given, tmp_path):
    lines = []
    job = prepare(given(hold_out=10), JobOptions(say=lines.append), beside=tmp_path)
    one, c = job.inputs[0], job.inputs[0].data.labels["prompt"]
    said = "prompt is not read back: 300 images have 156 prompts; adherence is not measured."
    assert said in lines
    assert one.unread == said
    expected = job.prior.embedding_of(
        torch.tensor(job.config.classes if job.config.classes != "all" else range(156))[c]
    )
    assert torch.equal(one.data.vectors["prompt"], expected)
    assert len(one.data) == 300, "p̂ sees all labels, also of prompts that are held out"


def test_few_prompts_with_enough_images_are_read_back(pipeline, tmp_path):
    c, y, values = torch.arange(40) % 2, torch.arange(40) // 20, {"dark": ("no", "yes"), "prompt": tuple(PROMPTS[:2])}
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    write_imagefolder(tmp_path, LabelledImages(x, {"dark": y, "prompt": c}, values))
    given = {"prior": str(pipeline), "data": str(tmp_path), "control": "dark", "condition": "prompt", **TINY}
    (one,) = prepare(given).inputs
    assert one.unread is None
    assert one.data.vectors == {}, "p̂(y | x) needs none"


@pytest.mark.parametrize("known", [100, 155])
def test_rows_with_other_prompts_are_left_out_and_counted(given, known):
    """Each of the first 144 prompts has two images, the others one."""
    lines, left_out = [], 300 - min(2 * known, known + 144)
    first = f"the first: row {known + 1}, {PROMPTS[known]!r}"
    message = f"{left_out} of 300 rows have another prompt than the {known} asked for ({first}): they were left out."
    with pytest.warns(UserWarning, match=re.escape(message)):
        job = prepare(given(prompts=PROMPTS[:known]), JobOptions(say=lines.append))
    assert len(job.inputs[0].data) == 300 - left_out
    assert f"{300 - left_out} of 300 rows ({left_out} of another class left out)" in lines[0]


def test_no_row_with_any_of_the_prompts_is_refused(given):
    with pytest.raises(ValueError, match=r"300 of 300 rows have another prompt .* No row is left: check the prompts"):
        prepare(given(prompts=["dusk a"]))


@pytest.fixture
def run(given, fitted, tmp_path):
    """An untrained run with ten prompts held out."""
    job = prepare(given(hold_out=10), beside=tmp_path)
    return Run.start(job.config, job.prior, {"dark": fitted[1]})


@pytest.mark.filterwarnings("ignore")
def test_a_run_is_measured_on_prompts_without_labels(run, fitted):
    """p̂ and its judge answer for prompts that came after the labels; a number would have to be known."""
    new = [f"{word} {letter}d" for word in ("day", "night") for letter in "pqrstuvw"]
    assert on_prompts(run, new) == "measured on 16 prompts; 0 of these were trained on"
    dark, c = torch.arange(32) % 2, torch.tensor(run.classes).repeat_interleave(2)
    x = torch.where(dark == 1, -0.4, 0.4)[:, None, None, None].expand(-1, 3, 32, 32)
    expected = dark ^ torch.tensor([run.prior.class_names[i].startswith("night") for i in c]).long()
    chance = 0.5 + 4 * 0.5 / 32**0.5  # and four standard errors, if the embedding said nothing
    found = run.reward.table("dark", x, {"c": c}).argmax(1)  # of images, as p̂ takes them
    assert float((found == expected).float().mean()) > chance
    opinion = replace(run.second_opinion, codec=Codec(), outside=None)
    judged = opinion.measure(x, run.conditions).judge_labels["dark"]
    assert float((judged == expected).float().mean()) > chance
    with pytest.raises(ValueError, match=r"p̂\(y \| x, c\) knows c in"):
        Among(fitted[1].classifier, run.known_classes).log_prob(x, c)
    figures = evaluate(run, 32).metrics()
    assert figures["ctrl"]["class_accuracy"] is None
    assert len(figures["certificate"]["pairs"]["hits"]) == 32


def test_a_comparison_reads_the_embeddings_again(run, data):
    """Of the same rows in the same order as training did."""
    again = read_again(run, run.config.controls[0], str(data))
    prompts = [run.prior.names[again.values["prompt"][c]] for c in again.labels["prompt"].tolist()]
    assert torch.equal(again.vectors["prompt"], run.prior.embedding_of(torch.tensor(prompts)))


def test_cells_of_another_seed_are_measured_on_the_same_conditions(run, tmp_path, monkeypatch):
    """Fitted or loaded again: a seed that draws other conditions to measure would compare other tasks."""
    monkeypatch.setattr(comparison_room, "train", lambda run, phase: iter(()))
    run.config = run.config.with_(prompts=PROMPTS)  # the file stands in a run's folder, and this run has none
    comparison = Comparison(run, tmp_path, ["ctrl"], n=64)
    others = ConditionSplit.of(run.known_classes, run.config.hold_out, 5)
    assert others.measured != run.classes, "of 146 prompts 64 are measured"
    for models in (comparison.fit_models(60, 5), comparison.fit_models(60, 5)):
        assert models.run.config.seed == 5
        assert models.run.classes == run.classes
        assert torch.equal(models.run.conditions.cond["c"], run.conditions.cond["c"])


def test_a_classifier_that_is_handed_over_serves_other_prompts(given, fitted):
    folder, panel = fitted
    assert panel.classifier.embedding == 16
    assert panel.quality.accuracy > 0.5 + 4 * 0.5 / 45**0.5, "on 45 held-out images; x alone is a coin"
    assert panel.reader is None
    lines = []
    with pytest.warns(UserWarning, match="have another prompt"):
        job = prepare(given(classifier_from=str(folder), prompts=PROMPTS[:120]), JobOptions(say=lines.append))
    one = job.inputs[0]
    assert torch.equal(one.panel.log_prob(one.data), panel.log_prob(one.data))
    assert one.unread in lines


def test_a_classifier_of_another_embedding_is_refused(given, fitted, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        saved("SD 3", tmp_path / "other")
    with pytest.raises(ValueError, match="prompts by embeddings of length 16, which this prior does not make"):
        prepare(given(classifier_from=str(fitted[0]), prior=str(tmp_path / "other")), beside=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_many_prompts_keeps_them_and_may_be_moved(given, fitted, tmp_path):
    """Trained on a population, certified on it and on what was held out, and opened elsewhere."""
    job = given(classifier_from=str(fitted[0]), hold_out=10)
    metrics = train_job(job, tmp_path / "first" / "run")
    assert metrics["conditions"] == {"trained": 146, "held_out": 10}
    assert set(metrics["held_out"]) == {"prior", "target", "ctrl", "certificate"}
    assert len(metrics["held_out"]["certificate"]["conditions"]) == 10
    assert len(metrics["certificate"]["conditions"]) == 64
    run = shutil.move(tmp_path / "first" / "run", tmp_path / "run")
    assert (run / "prompts.txt").read_text().splitlines() == list(in_order(PROMPTS))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["prompts"], config["classes"], len(config["hold_out"])) == ("prompts.txt", "all", 10)
    opened = Run.load(run)
    conditions = opened.training_conditions
    assert (conditions.groups, conditions.pooled) == (146, True)
    assert not set(conditions.cond["c"].tolist()) & set(config["hold_out"])
    assert opened.sample(torch.ones(2).long(), torch.tensor(config["hold_out"][:2])).shape == (2, 3, 32, 32)


@pytest.fixture
def panel():
    """p̂(y | x) of images of the pipeline's size, fitted to nothing."""
    space = LabelSpace(("no", "yes"))
    return Panel("dark", space, (3, 32, 32), Classifier(3, 2).eval(), None, Classifier(3, 2).eval())


@pytest.mark.filterwarnings("ignore")
def test_a_dry_run_says_how_many_prompts_are_encoded(given, panel, tmp_path, monkeypatch):
    """A pool of twelve prompts, and those of the measurements."""
    plain = {"classifier": {**FAST, "conditional": False}, "weighted": {"updates": 2, "cache": 12}}
    job = prepare(given(hold_out=10, **plain), beside=tmp_path)
    run = Run.start(job.config, job.prior, {"dark": panel})
    prompted, encoded = run.prior.denoiser.call, []
    encode = prompted.encode_alone
    monkeypatch.setattr(prompted.store, "encode", lambda prompt: encoded.append(prompt) or encode(prompt))
    said = encoding_of(run, run.config)
    assert (said["prompts"], said["of_prompts"]) == (12 + 64 + 10, 156)
    prior_samples(run, run.training_conditions, 12, "pool")
    evaluate(run, 8)
    assert len(set(encoded)) == len(encoded) <= said["prompts"], "each once"
    assert len(encoded) >= 64 + 10, "measurements are on these"
