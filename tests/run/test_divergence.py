"""Losses that are not finite, and memory that runs short: a training goes on, or says what to turn down."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from faults import disturbed, log

from ctrl_diffusion.run.config import Config


def test_a_batch_of_paths_that_is_not_finite_is_left_out_and_counted(run, trained, monkeypatch):
    nan = {3, 4}  # both updates of the second batch of paths
    disturbed(monkeypatch, lambda n, step, _: replace(step, loss=step.loss * (math.nan if n in nan else 1.0)))
    records = [record for record in trained(run) if record["stage"] == "adjoint"]
    assert [record.get("skipped") for record in records if "kl" in record and "kept" not in record] == [
        None, None, 1, 2, 2, 2, 2, 2
    ]  # fmt: skip
    assert {record["skipped"] for record in records if "averaged" in record} == {2}
    assert all(json.loads(line) for line in log(run).splitlines()), "no NaN in the log"


def test_rewards_that_stay_not_finite_stop_the_learner_and_the_last_good_control_is_kept(run, trained, monkeypatch):
    config = yaml.safe_load((run / "config.yaml").read_text())
    often = {"evaluation": {**config["evaluation"], "probes": 4}, "max_skipped": 1}
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **often}))
    disturbed(monkeypatch, lambda n, step, _: replace(step, loss=step.loss * (math.inf if n > 4 else 1.0)))
    *_, stopped, kept = trained(run)
    assert stopped["stopped"].startswith("diverged: the loss of update 8 is inf, as in 1 batches before it")
    assert kept["kept"]
    assert math.isfinite(kept["J"])


def test_out_of_memory_halves_the_micro_batch_once(run, trained, monkeypatch, undisturbed):
    def full(number, step, learner):
        if (learner.micro or 8) > 4 and number == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step

    disturbed(monkeypatch, full)
    with pytest.warns(RuntimeWarning, match="training goes on with micro_batch 4 instead of 8"):
        records = trained(run)
    assert Config.read(run / "config.yaml").micro_batch == 4
    # the same training, but for rounding: nothing twice, nothing missing
    before = [json.loads(line) for line in undisturbed.splitlines()]
    assert [(r["stage"], r["update"]) for r in records] == [(r["stage"], r["update"]) for r in before]
    assert [r.get("loss", 0.0) for r in records] == pytest.approx([r.get("loss", 0.0) for r in before], rel=1e-2)


def test_out_of_memory_for_all_that_says_what_to_turn_down(run, trained, monkeypatch):
    def full(number, step, learner):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    disturbed(monkeypatch, full)
    with (
        pytest.warns(RuntimeWarning, match="micro_batch 4"),
        pytest.raises(MemoryError, match=r"turn down micro_batch \(now 4\) or batch, or set .*--resume") as caught,
    ):
        trained(run)
    assert "\n" not in str(caught.value)
