"""A time is turned into updates once, a stage leaves what it does not need, and a finished run can be trained on."""

import json
import shutil

import pytest
import torch
import yaml
from faults import disturbed, interrupted_at
from tiny import TINY

from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.jobs.train import extend_job, resume_job, train_job
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.learn.step import Speed, cost_of_update
from ctrl_diffusion.run import stages
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.stages import between_probes, extended, follows_probes, longest_interval, stages_of
from ctrl_diffusion.system.progress import Interrupted, silent

BOTH = {**TINY, "learners": ["weighted", "adjoint"]}
pytestmark = pytest.mark.filterwarnings("ignore:log Z")


def config_of(**values):
    return Config.from_values({"prior": "digits", "control": "ink", "data": "-", **BOTH, **values})


class Untouched:
    """A run of which only the sizes are asked."""

    conditions = training_conditions = probe_conditions = Conditions({"c": torch.arange(10)}, {"ink": 4})


@pytest.fixture
def seconds_an_evaluation(monkeypatch):
    """A machine of known speed."""

    def set_to(seconds):
        monkeypatch.setattr(stages, "speed_of", lambda *_: Speed(seconds, 3 * seconds))

    return set_to


def planned(config):
    """The seconds that all updates and probes will take, a second for each evaluation."""
    each = [(stage.settings.updates, cost_of_update(stage.settings, config.steps)) for stage in stages_of(config)]
    made = [stage.settings.updates // between_probes(Untouched, config, stage) + 1 for stage in stages_of(config)
            if follows_probes(config, stage)]  # fmt: skip
    count = sum(made) + (len(each) - len(made)) * (config.evaluation.probes + 1)
    return sum(updates * cost for updates, cost in each), count * 160 * (2 * config.steps + 1)


@pytest.mark.parametrize("decay", ["cosine", "probes"])
@pytest.mark.parametrize("minutes", [1, 10, 60])
def test_a_time_is_used_and_shared_in_proportion(seconds_an_evaluation, minutes, decay):
    seconds_an_evaluation(1e-3)
    usual = {"weighted": {"updates": 700, "renoising": 175, "cache": 8}, "adjoint": {"updates": 300, "batch": 32}}
    before = config_of(time=f"{minutes}m", evaluation={"probes": 10}, decay=decay, **usual)
    after = stages.budgeted(Untouched, before)
    training, probes = planned(after)
    assert training + probes == pytest.approx(60e3 * minutes, rel=0.05)
    assert probes <= 0.25 * 60e3 * minutes
    assert training <= after.budget <= 1.05 * training
    ratio = after.adjoint.updates / before.adjoint.updates
    assert after.weighted.updates == pytest.approx(700 * ratio, rel=0.02, abs=1)
    assert after.weighted.renoising == pytest.approx(175 * ratio, rel=0.02, abs=1)
    assert (after.time, after.backprop) == (None, before.backprop)
    seconds_an_evaluation(1.0)
    assert stages.budgeted(Untouched, after) == after, "the clock decides once"


@pytest.mark.parametrize("name", ["contrast", "weighted", "adjoint"])
@pytest.mark.parametrize("steps", [2, 20, 80])
def test_a_stage_that_follows_its_probes_does_not_wait_longer_the_larger_its_limit(name, steps):
    """Nor do its probes, 160 paths of the policy beside the prior, cost more than 0.15 of its updates."""
    one, waits = 160 * (2 * steps + 1), []
    for updates in (1, 10, 100, 1000, 10**6, 10**7):
        config = config_of(learners=[name], steps=steps, decay="probes", evaluation={"probes": 10})
        config = config.with_(**{name: {"updates": updates, **({"renoising": 0} if name == "weighted" else {})}})
        (stage,) = stages_of(config)
        waits.append(between_probes(Untouched, config, stage))
        assert updates // waits[-1] >= min(updates, 10)
    assert waits[-1] == waits[-2] == longest_interval(Untouched, config, stage) >= 50
    assert one <= 0.15 * waits[-1] * cost_of_update(stage.settings, steps)


def test_updates_are_of_all_learners_together():
    after = stages.budgeted(Untouched, config_of(updates=400, weighted={"updates": 50, "renoising": 0}))
    assert (after.weighted.updates, after.adjoint.updates) == (377, 22)
    assert (after.updates, after.budget) == (None, None)


@pytest.mark.parametrize("budget", [None, 10**6])
def test_what_a_learner_leaves_goes_to_the_next(budget):
    config = config_of(budget=budget, more=[5])
    renoising, weighted, adjoint, added = stages_of(config)
    assert (renoising.name, added.name) == ("re-noising", "adjoint +1")
    cost = cost_of_update(adjoint.settings, config.steps)
    stage, per_update = extended(config, adjoint, 7 * cost + 1)
    assert per_update == cost
    assert stage.settings.updates == adjoint.settings.updates + (7 if budget else 0)
    assert extended(config, renoising, 10**6)[0] == renoising, "the warm start's effect, not the learner"
    assert extended(config, added, 10**6)[0] == added, "what was added has a time of its own"
    assert weighted.settings.updates == 3


@pytest.fixture(scope="module")
def finished(once):
    return once("finished", lambda folder: demo_job({**BOTH, "weighted": TINY["weighted"]}, folder))


def contents(folder):
    """What training and measuring wrote, without what a clock measured."""
    files = ["control/control.safetensors", "progress.jsonl", "samples/metadata.csv"]
    metrics = json.loads((folder / "metrics.json").read_text())
    return [(folder / name).read_bytes() for name in files], {k: v for k, v in metrics.items() if k != "seconds"}


def test_a_finished_run_goes_on_as_if_it_had_been_planned(finished, tmp_path, ctrl_here):
    run = shutil.copytree(finished, tmp_path / "run")
    done = ctrl_here("train", "--resume", run, "--updates", 4, "--quiet")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["more"] == [4]
    log = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    before = (finished / "progress.jsonl").read_text().splitlines()[:-1]
    assert (run / "progress.jsonl").read_text().splitlines()[: len(before)] == before
    assert [record["update"] for record in log if record["stage"] == "adjoint +1" and "kept" not in record] == [
        0, 1, 2, 3, 4, 4
    ]  # fmt: skip
    assert json.loads((run / "metrics.json").read_text())["training"]["stages"][-1]["stage"] == "adjoint +1"
    again = tmp_path / "again"
    train_job(
        config | {"controls": [row | {k: str(run / k) for k in ("data", "judge_data")} for row in config["controls"]]},
        again,
    )
    assert contents(again) == contents(run)


def test_a_run_that_goes_on_may_be_interrupted(finished, tmp_path, monkeypatch):
    runs = [shutil.copytree(finished, tmp_path / name) for name in "ab"]
    extend_job(runs[0], updates=4)
    with monkeypatch.context() as patch:
        disturbed(patch, interrupted_at(3))
        with pytest.raises(Interrupted, match="Everything is saved"):
            extend_job(runs[1], updates=4)
    with pytest.raises(ValueError, match="is no finished run"):
        extend_job(runs[1], updates=4)
    resume_job(runs[1])
    assert contents(runs[1]) == contents(runs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "soon"], "'soon' is no time"),
        (["--time", "1h", "--updates", 5], "either --time or --updates"),
        (["--time", "1h", "--seed", 1], "--resume takes everything but --time"),
    ],
)
def test_what_cannot_go_on_is_one_line_and_changes_nothing(finished, ctrl_here, options, message):
    before = contents(finished)
    done = ctrl_here("train", "--resume", finished, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(finished) == before
    assert not (finished / "checkpoint").exists()


def test_a_time_trains_a_demo_and_its_config_makes_it_again(tmp_path, ctrl_here):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(BOTH))
    run = tmp_path / "run"
    done = ctrl_here("demo", "--config", tmp_path / "tiny.yaml", "--time", "3s", "--quiet", "--out", run)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["time"], config["updates"]) == (None, None)
    assert config["budget"] > 0
    assert config["adjoint"]["updates"] > 3
    assert json.loads((run / "metrics.json").read_text())["verdict"]["cut"] is True
    rows = [row | {k: str(run / k) for k in ("data", "judge_data")} for row in config["controls"]]
    train_job(config | {"controls": rows}, tmp_path / "again")
    (files, metrics), (again, metrics_again) = contents(run), contents(tmp_path / "again")
    assert files == again
    assert metrics["certificate"] == metrics_again["certificate"]


def test_a_learner_that_stands_still_leaves_its_budget_also_after_an_interruption(finished, tmp_path, monkeypatch):
    still = {"updates": 8, "renoising": 0, "lr_embedding": 1e-12, "lr_adapter": 1e-12}
    settings = {**BOTH, "weighted": {**TINY["weighted"], **still}, "evaluation": {**TINY["evaluation"], "probes": 8}}
    settings |= {"budget": 10**6, "patience": 1, "prior": "digits", "checkpoint": 1}
    (row,) = yaml.safe_load((finished / "config.yaml").read_text())["controls"]
    row |= {"data": str(finished / "data"), "judge_data": str(finished / "judge_data"), "classifier": None}
    row = {key: value for key, value in row.items() if value is not None}
    settings["controls"] = [row | {"classifier_from": str(finished / "classifier")}]
    totals = {}
    train_job(settings, tmp_path / "a", phase=lambda what, n: totals.update({what: n}) or silent(what, n))
    with monkeypatch.context() as patch:
        disturbed(patch, interrupted_at(2))
        with pytest.raises(Interrupted, match="Everything is saved"):
            train_job(settings, tmp_path / "b")
    resume_job(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    weighted, _ = json.loads((tmp_path / "a" / "metrics.json").read_text())["training"]["stages"]
    assert weighted["update"] < 8
    config = Config.read(tmp_path / "a" / "config.yaml")
    left = (8 - weighted["update"]) * cost_of_update(config.weighted, config.steps)
    gained = left // cost_of_update(config.adjoint, config.steps)
    assert totals["learner: adjoint"] == 3 + gained > 3
