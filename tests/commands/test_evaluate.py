"""A run measured again."""

import json

import pytest

from ctrl_diffusion.run.measure import remeasured
from ctrl_diffusion.run.run import Run


def evaluated(ctrl_here, run, out, *options):
    done = ctrl_here("evaluate", run, "-n", 80, "--out", out, "--quiet", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.filterwarnings("ignore:log Z")
def test_evaluate(ctrl_here, quick_run, tmp_path):
    """By noise of its own, the same each time; by the run's seed, with the samples the run was measured with."""
    metrics = json.loads((quick_run / "metrics.json").read_text())
    figures = evaluated(ctrl_here, quick_run, tmp_path / "a.json")
    assert figures["ctrl"]["samples"] == 80
    assert {len(column) for column in figures["certificate"]["pairs"].values()} == {40}
    assert figures["seed"] == 1
    assert figures["target"] != metrics["target"]
    again = evaluated(ctrl_here, quick_run, tmp_path / "b.json", "--seed", 1)
    assert again == figures
    # the prior's samples depend on the seed alone, not on n
    of_run = evaluated(ctrl_here, quick_run, tmp_path / "c.json", "--seed", 0)
    assert (of_run["seed"], of_run["target"]) == (0, metrics["target"])


@pytest.mark.filterwarnings("ignore:log Z")
def test_more_samples_of_the_prior_certify_more(ctrl_here, quick_run, tmp_path):
    few, more = (evaluated(ctrl_here, quick_run, tmp_path / f"{n}.json", "--prior-samples", n) for n in (20, 300))
    assert (few["prior_samples"], more["prior_samples"]) == (20, 300)
    certified = [figures["certificate"]["certified_pairs"] for figures in (few, more)]
    assert certified[0] < certified[1] == more["certificate"]["of_pairs"] - len(more["certificate"]["uncertified"])
    assert few["certificate"]["uncertified"][0].startswith("c = 0, ink = ")


def test_fewer_samples_than_classes_are_refused(quick_run):
    with pytest.raises(ValueError, match=r"--prior-samples 3: give 4 at least"):
        remeasured(Run.load(quick_run), prior_samples=3)
