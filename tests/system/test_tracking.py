"""Trackers are sent what the log of a training says."""

import json

import pytest
from accelerate.tracking import TensorBoardTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ctrl_diffusion.system import tracking
from ctrl_diffusion.system.tracking import TRACKED, Tracking, check_trackers

RECORDS = [
    {"stage": "weighted", "update": 0, "J": -3.0},
    {"stage": "weighted", "update": 1, "loss": 2.0, "grad_norm": 0.5, "skipped": 1},
    {"stage": "weighted", "update": 1, "averaged": True, "J": -2.0},
    {"stage": "adjoint", "update": 1, "loss": 7.0, "stopped": "diverged"},
]


def shown(folder):
    """What TensorBoard makes of the files: (update, value) by name."""
    events = EventAccumulator(str(folder / TRACKED / tracking.PROJECT)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_figures_of_every_update(tmp_path):
    trackers = Tracking(["tensorboard"], tmp_path, {})
    trackers.start([])
    for record in [*RECORDS, {**RECORDS[1], "kept": True}]:
        trackers.log(record)
    trackers.log_metrics({"certificate/gap_nats": 0.5})
    trackers.close()
    assert shown(tmp_path) == {
        "weighted/J": [(0, -3.0), (1, -2.0)],
        "weighted/loss": [(1, 2.0)],
        "weighted/grad_norm": [(1, 0.5)],
        "weighted/skipped": [(1, 1.0)],
        "adjoint/loss": [(2, 7.0)],
        "certificate/gap_nats": [(2, 0.5)],
    }


def test_what_is_done_again_is_shown_once(tmp_path):
    trackers = Tracking(["tensorboard"], tmp_path, {})
    for begin, losses in ((0, {1: 8.0, 2: 8.0}), (0, {1: 5.0, 2: 4.0, 3: 9.0, 4: 9.0}), (2, {3: 3.0, 4: 2.0})):
        trackers.start([{"loss": 0.0}] * begin)
        for update, loss in losses.items():
            trackers.log({"stage": "adjoint", "update": update, "loss": loss})
    trackers.close()
    assert shown(tmp_path) == {"adjoint/loss": [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]}


def test_nobody_is_told_unasked(tmp_path):
    trackers = Tracking([], tmp_path, {})
    trackers.start([])
    trackers.log(RECORDS[1])
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_told_no_more(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    trackers = Tracking(["tensorboard"], tmp_path, {})
    trackers.start([])
    monkeypatch.setattr(TensorBoardTracker, "log", full)
    with pytest.warns(RuntimeWarning, match="tensorboard is dropped: no space left"):
        trackers.log(RECORDS[1])
    trackers.log(RECORDS[1])
    monkeypatch.setattr(TensorBoardTracker, "start", full)
    with pytest.warns(RuntimeWarning, match="tensorboard is dropped"):
        trackers.start(RECORDS[:2])
    trackers.close()


def test_a_tracker_that_is_not_there(ctrl_here, tmp_path, monkeypatch):
    arguments = ("--prior", "digits", "--data", "nowhere", "--control", "y", "--out", tmp_path / "run")
    done = ctrl_here("train", *arguments, "--track", "abacus")
    assert done.returncode == 2
    assert done.stderr.startswith("ctrl: --track abacus: unknown. There are: ")
    assert "tensorboard" in done.stderr
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="--track wandb: its package is not installed. Try: pip install wandb"):
        check_trackers(["wandb"])


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_run_tells_what_its_log_says(tmp_path, ctrl_here):
    config = tmp_path / "config.yaml"
    config.write_text(
        "{classifier: {updates: 150, head: ordinal, grid: 1, depth: 1}, track: [tensorboard], steps: 2, rank: 4, "
        "weighted: {updates: 2, batch: 16, cache: 8, renoising: 1}, adjoint: {updates: 4, batch: 8, reuse: 2}, "
        "evaluation: {prior_samples: 8, paths: 80, probes: 4, sweep_paths: 80}}"
    )
    done = ctrl_here("demo", "--config", config, "--out", tmp_path / "run", "--quiet")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "run" / "progress.jsonl").read_text().splitlines()]
    figures = shown(tmp_path / "run")
    assert [update for update, _ in figures["adjoint/loss"]] == [4, 5, 6, 7]
    log, kept = log[:-1], log[-1]
    assert kept["kept"], "sent when it was made"
    for stage in ("weighted", "adjoint"):
        losses = [record["loss"] for record in log if record["stage"] == stage and "loss" in record]
        assert len(figures[f"{stage}/J"]) == sum("J" in record for record in log if record["stage"] == stage)
        assert [value for _, value in figures[f"{stage}/loss"]] == pytest.approx(
            losses, rel=1e-5
        )  # six digits, float32
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    ((update, value),) = figures["certificate/objective_nats"]
    assert (update, value) == (7, pytest.approx(metrics["certificate"]["objective_nats"], rel=1e-5))
    assert metrics["certificate"]["gap_nats"] is None, "of eight samples"
    assert "certificate/gap_nats" not in figures
