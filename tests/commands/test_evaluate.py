"""A run measured again."""

import json

import pytest


@pytest.mark.filterwarnings("ignore:log Z")
def test_evaluate(ctrl_here, quick_run, tmp_path):
    done = ctrl_here("evaluate", quick_run, "-n", 80, "--out", tmp_path / "figures.json", "--quiet")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ctrl"]["samples"] == 80
    assert {len(column) for column in figures["certificate"]["pairs"].values()} == {40}
    # the prior's samples depend on the run's seed alone, not on n
    assert figures["target"] == json.loads((quick_run / "metrics.json").read_text())["target"]
