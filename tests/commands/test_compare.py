"""The comparison: every method on one run, what resumes, and what is refused."""

import json
import shutil

import pytest
import torch

from ctrl_diffusion.commands.jobs.compare import averaged, compare_job, interval
from ctrl_diffusion.commands.jobs.comparison import Comparison, subset
from ctrl_diffusion.commands.jobs.methods import METHODS
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.run import Run

FIGURES = (
    "accuracy judge_accuracy macro_f1 class_accuracy frechet kernel precision recall coverage diversity_ratio "
    "network_evaluations classifier_evaluations gradient_evaluations classifier_gradients seconds"
).split()


@pytest.fixture(scope="module")
def run(quick_run, tmp_path_factory):
    """The quick demo on one digit and few steps, so that what it costs does not count."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(quick_run, folder)
    config = Config.read(folder / "config.yaml")
    controls = [control.with_(classifier={"updates": 300}).model_dump() for control in config.controls]
    config.with_(
        controls=controls, classes=[3, 8], steps=4, learners=["weighted"],
        weighted={"updates": 2, "renoising": 0, "cache": 20}, evaluation={"prior_samples": 40, "probes": 1},
    ).write(folder / "config.yaml")  # fmt: skip
    return folder


def asked(run, out, **more):
    return compare_job(run, out, **{"strengths": (1.0, 2.0), "n": 16, **more})


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    """Every method on the run as it is, and two of them on fewer labels of two seeds."""
    out = tmp_path_factory.mktemp("compared")
    return out / "whole", asked(run, out / "whole")


def test_every_method_has_its_trials_and_its_rows(compared):
    out, found = compared
    rows = found["rows"]
    assert {row["method"] for row in rows} == set(METHODS) == set(found["chosen"])
    for name, spec in METHODS.items():
        trials = 2 if spec.trials is None else len(spec.trials)
        mine = [row for row in rows if row["method"] == name]
        assert sum(row["trial"] for row in mine) == trials
        assert sum(not row["trial"] for row in mine) == (trials if spec.front else 1)
        for row in mine:
            assert all(row[key] is not None for key in FIGURES), name
            guided = spec.trials is None
            assert (row["gap_nats"] is not None) == (
                guided and not row["trial"] and row["strength"] in (1.0, found["chosen"][name]["strength"])
            )
    assert all((out / name).is_file() for name in ("compare.json", "pareto.png", "report.html"))
    assert not (out / "labels.png").exists(), "one number of labels is no line"


def test_a_sample_costs_what_the_method_says(compared):
    """N = 4 steps and the read-out: one evaluation each at w = 1, two for what extrapolates."""
    _, found = compared
    cost = {(row["method"], row["strength"]): row for row in found["rows"] if not row["trial"]}
    assert cost["ctrl", 1.0]["network_evaluations"] == found["about"]["prior_evaluations"] == 5
    assert cost["ctrl", 2.0]["network_evaluations"] == cost["free-guidance", 2.0]["network_evaluations"] == 9
    assert cost["ctrl", 1.0]["classifier_evaluations"] == cost["ctrl", 1.0]["gradient_evaluations"] == 0
    assert cost["dps", 1.0]["gradient_evaluations"] == 4
    assert cost["mpgd", 1.0]["gradient_evaluations"] == 0
    assert cost["mpgd", 1.0]["classifier_gradients"] == 4
    assert cost["importance", 1.0]["network_evaluations"] == 8 * 5


def test_a_comparison_that_was_cut_off_goes_on_and_ends_as_the_whole(run, compared, tmp_path):
    out, _ = compared
    cut = json.loads((out / "compare.json").read_text())
    kept = [row for row in cut["rows"] if row["method"] in ("ctrl", "mpgd", "tds")]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "compare.json").write_text(json.dumps({**cut, "rows": kept[:5], "cells": []}))
    found = asked(run, tmp_path / "cut", methods=["ctrl", "mpgd", "tds"], resume=True)

    def without_time(rows):
        return sorted(json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows)

    again = json.loads((tmp_path / "cut" / "compare.json").read_text())
    assert without_time(again["rows"]) == without_time(kept)
    assert found["chosen"].keys() == {"ctrl", "mpgd", "tds"}
    with pytest.raises(ValueError, match="compares another run, or with another -n"):
        asked(run, tmp_path / "cut", resume=True, n=24)


def test_cells_of_other_labels_and_seeds_are_fitted_once_and_kept(run, tmp_path):
    out, methods = tmp_path / "out", ["ctrl", "mpgd"]
    found = asked(run, out, methods=methods, labels=[60, 80], seeds=[1, 2], strengths=(1.0,))
    cells = {(row["method"], row["labels"], row["seed"]) for row in found["rows"] if not row["trial"]}
    assert cells == {(m, n, s) for m in methods for n in (60, 80) for s in (1, 2)}
    assert {(c["labels"], c["seed"]) for c in found["cells"]} == {(60, 1), (60, 2), (80, 1), (80, 2)}
    assert (out / "labels.png").is_file()
    one = Run.load(out / "cells" / "60-labels-seed-1")
    weights = one.panels["ink"].classifier.state_dict()
    other = Run.load(out / "cells" / "60-labels-seed-2").panels["ink"].classifier.state_dict()
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    # a row that is missing asks what was kept, and comes out the same
    cut = json.loads((out / "compare.json").read_text())
    missing = next(row for row in cut["rows"] if (row["method"], row["labels"], row["trial"]) == ("mpgd", 80, False))
    cut["rows"].remove(missing)
    cells = cut.pop("cells")  # as if it had been cut off before what is known of a cell was written
    (out / "compare.json").write_text(json.dumps({**cut, "cells": []}))
    before = (out / "cells" / "80-labels-seed-1").stat().st_mtime_ns
    again = asked(run, out, methods=methods, labels=[60, 80], seeds=[1, 2], strengths=(1.0,), resume=True)
    row = next(r for r in again["rows"] if all(r[k] == missing[k] for k in ("method", "labels", "seed", "trial")))
    # six digits are written
    assert [row[name] for name in FIGURES[:-1]] == pytest.approx([missing[name] for name in FIGURES[:-1]], rel=1e-5)
    assert (out / "cells" / "80-labels-seed-1").stat().st_mtime_ns == before
    for cell, known in zip(again["cells"], cells, strict=True):
        assert all(cell[name] == pytest.approx(known[name], rel=1e-5) for name in known if name != "seconds")


def test_a_comparison_gone_on_with_fewer_methods_keeps_the_rows_of_the_others(run, tmp_path):
    found = asked(run, tmp_path / "out", methods=["ctrl", "mpgd"], strengths=(1.0,))
    again = asked(run, tmp_path / "out", methods=["ctrl"], strengths=(1.0,), resume=True)
    assert len(again["rows"]) == len(found["rows"]) == 4
    assert again["chosen"].keys() == {"ctrl", "mpgd"}


def test_a_classifier_that_training_would_refuse_is_compared_and_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Panel, "informed", property(lambda self: False))
    with pytest.warns(UserWarning, match="60 labels, seed 1: p̂ of 'ink' is not clearly better than chance"):
        found = asked(run, tmp_path / "out", methods=["mpgd"], labels=[60], seeds=[1], strengths=(1.0,))
    assert [cell["uninformed"] for cell in found["cells"]] == [["ink"]]
    assert [row["trial"] for row in found["rows"]] == [True, False]
    assert "would refuse it" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_subsets_are_even_over_classes_and_disjoint_from_the_rest(run):
    data = Comparison(Run.load(run), run / "compare", ["ctrl"], n=16).data["ink"]
    mine, rest = subset(data, "ink", 40, seed=0)
    assert (len(mine), len(rest)) == (40, len(data) - 40)
    counts = mine.labels["ink"].bincount() / 40 - data.labels["ink"].bincount() / len(data)
    assert counts.abs().max() < 1 / 40
    assert not set(mine.digests()) & set(rest.digests())


def test_intervals_are_students():
    assert interval([0.5], 0.1) == (0.5, pytest.approx(0.196))
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5))  # t of two degrees of freedom at 97.5 %


def test_rows_are_averaged_over_seeds_and_trials_left_out():
    base = {"method": "ctrl", "labels": 50, "strength": 1.0, "settings": {}, "accuracy_stderr": 0.1, "gap_nats": None}
    rows = [
        {**base, "seed": seed, "trial": trial, "accuracy": a}
        for seed, trial, a in ((0, True, 0.0), (1, False, 0.4), (2, False, 0.6))
    ]
    (found,) = averaged(rows, {"ctrl": {"settings": {}, "strength": 1.0}})
    assert found["accuracy"][0] == pytest.approx(0.5)
    assert (found["seeds"], found["chosen"], "gap_nats" in found) == (2, True, False)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--methods", "magic"], "--methods magic: unknown. There are: ctrl, classifier-guidance"),
        (["--labels", "50,many"], "--labels 50,many: give numbers with commas between them"),
        (["--labels", "5000"], "--labels 5000: ink has"),
        (["--labels", "20"], "example(s). Bring at least 10"),
        (["--quick"], "--quick is of ctrl compare exact"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run, ctrl_here, tmp_path, option, said):
    done = ctrl_here("compare", run, "--out", tmp_path / "out", *option)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists(), "nothing was begun"
