"""What ends a learner before its last update, and what lowers γ."""

import json
import math

import pytest
import torch
import yaml
from tiny import TINY

from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.run import stages

BOTH = {**TINY, "learners": ["weighted", "adjoint"]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_a_kl_budget_lowers_gamma_and_a_run_can_be_made_again_from_it(tmp_path):
    first = demo_job(
        {**BOTH, "kl_budget": 0.3, "evaluation": {**TINY["evaluation"], "prior_samples": 100}}, tmp_path / "a"
    )
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert 0 < config["gamma"] < 1
    assert "within 0.3 nats" in (tmp_path / "a" / "report.html").read_text()
    again = demo_job({key: value for key, value in config.items() if key != "data"}, tmp_path / "b")
    assert again["certificate"] == first["certificate"]


@pytest.mark.filterwarnings("ignore:log Z")
@pytest.mark.parametrize("value", [float("nan"), pytest.param(1e9, marks=pytest.mark.slow)])
def test_a_learner_that_diverges_is_rolled_back(tmp_path, monkeypatch, value):
    """After three good updates the parameters are not finite any more, or so large that the control is lost."""
    learner_of = stages.learner_of

    def poisoned(run, stage, phase):
        learner = learner_of(run, stage, phase)
        if stage == "weighted":
            return learner

        def steps(policy, *rest):
            for number, step in enumerate(learner(policy, *rest), start=1):
                if number == 4:
                    with torch.no_grad():
                        policy.trainable()[0].mul_(value)
                yield step

        return steps

    monkeypatch.setattr(stages, "learner_of", poisoned)
    settings = {
        **BOTH,
        "adjoint": {"updates": 8, "batch": 8},
        "weighted": {**TINY["weighted"], "updates": 60, "batch": 64},
    }
    metrics = demo_job({**settings, "evaluation": {**TINY["evaluation"], "probes": 8}}, tmp_path / "run")
    assert math.isfinite(metrics["certificate"]["objective_nats"])
    stopped = [stage for stage in metrics["training"]["stages"] if "stopped" in stage]
    assert [stage["stage"] for stage in stopped] == ["adjoint"]
    assert "diverged" in stopped[0]["stopped"]
    assert "adjoint stopped at update" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_patience_ends_a_learner_that_brings_nothing(tmp_path):
    still = {"updates": 40, "batch": 8, "lr_embedding": 1e-12, "lr_adapter": 1e-12}
    settings = {**BOTH, "adjoint": still, "patience": 2, "evaluation": {**TINY["evaluation"], "probes": 10}}
    metrics = demo_job(settings, tmp_path / "run")
    (stopped,) = [stage for stage in metrics["training"]["stages"] if stage["stage"] == "adjoint"]
    assert "of the last 2 probes are no higher" in stopped["stopped"]
    assert stopped["update"] < 40
    assert stopped["averaged"]
    assert math.isfinite(stopped["J"])
    assert metrics["verdict"]["climbing"] is None


@pytest.mark.filterwarnings("ignore:log Z", "ignore:weighted learns")
@pytest.mark.parametrize(("decay", "patience"), [("cosine", 4), ("probes", 4), ("probes", None)])
def test_a_first_learner_that_falls_goes_on_from_the_best_at_half_the_rate(tmp_path, decay, patience):
    """Here the rate is far too high; without patience a learner does as its settings say."""
    wild = {**TINY["weighted"], "updates": 16, "renoising": 0, "lr_embedding": 10.0, "lr_adapter": 0.3}
    settings = {**TINY, "weighted": wild, "patience": patience, "evaluation": {**TINY["evaluation"], "probes": 4}}
    settings["decay"] = decay
    demo_job(settings, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    first, *probes = [record for record in records if "J" in record and "averaged" not in record]
    fallen = [probe for probe in probes if probe["J"] < first["J"]]
    assert fallen
    slower = [record["update"] for record in records if "slower" in record]
    assert slower == ([probe["update"] for probe in fallen if "kept" not in probe] if patience else [])
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("at half the rate" in page) == bool(patience)
