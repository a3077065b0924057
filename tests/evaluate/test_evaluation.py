"""What an evaluation says of conditions that no training saw."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from drawn import Drawn

from ctrl_diffusion.evaluate.evaluation import Evaluation, generalises


def certified(gap, stderr):
    breakdown = SimpleNamespace(conditions=["c = 1", "c = 2"])
    return Evaluation(None, None, None, SimpleNamespace(gap=gap, stderr=stderr, breakdown=breakdown), 0)


@pytest.mark.parametrize(
    ("unseen", "seen", "expected"),
    [
        ((1.1, 0.1), (0.9, 0.1), "0.90 ± 0.10 nats: within two standard errors"),
        ((1.2, 0.1), (0.9, 0.1), "0.90 ± 0.10 nats: larger by 0.30 ± 0.14, more than two standard errors"),
        ((0.6, 0.1), (0.9, 0.1), "0.90 ± 0.10 nats: smaller by 0.30 ± 0.14, more than two standard errors"),
        ((None, None), (0.9, 0.1), "gap on c it never saw: not certified, on those it was trained on 0.90 ± 0.10 nats"),
        ((0.9, 0.1), (None, None), "gap on c it never saw 0.90 ± 0.10 nats, on those it was trained on: not certified"),
    ],
)
def test_a_difference_is_said_beyond_two_standard_errors(unseen, seen, expected):
    line = generalises(replace(certified(*seen), held_out=certified(*unseen)))
    assert line.endswith(expected)
    assert "\n" not in line


def test_without_held_out_conditions_nothing_is_said():
    assert generalises(certified(0.9, 0.1)) is None


@pytest.mark.parametrize("gap", [0.2, 0.6])
def test_what_is_said_is_true(gap):
    """400 pairs of measurements: two standard errors of no difference are passed in 5 % of them, those of a real one,
    here ten, always. To four errors of a count of 400, which is less than the count itself."""
    share = 0
    for seed in range(400):
        seen, unseen = Drawn("gaussian", seed).certify(), Drawn("gaussian", 1000 + seed, gap=gap).certify()
        evaluation = Evaluation(None, None, None, seen, 0, held_out=Evaluation(None, None, None, unseen, 0))
        share += "more than two standard errors" in generalises(evaluation)
    expected = 20 if gap == 0.2 else 400
    assert abs(share - expected) <= 4 * math.sqrt(20 * 0.95)


def test_held_out_metrics_are_those_of_the_evaluation_itself():
    seen, unseen = Drawn("gaussian", 0).evaluation(), Drawn("gaussian", 1).evaluation()
    assert "held_out" not in seen.metrics()
    figures = replace(seen, held_out=unseen).metrics()
    assert {name: figures[name] for name in seen.metrics()} == seen.metrics()
    assert figures["held_out"] == {name: unseen.metrics()[name] for name in ("prior", "target", "ctrl", "certificate")}
