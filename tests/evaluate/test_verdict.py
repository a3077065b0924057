"""When a control counts as learned, and what is said of one that does not."""

import pytest
import torch

from ctrl_diffusion.evaluate.verdict import Climb, Gain, Verdict, likely_causes

GOOD = {"nll": 0.4, "chance_nll": 1.39}
POOR = {"nll": 1.3, "chance_nll": 1.39}


@pytest.mark.parametrize(("shift", "clear"), [(0.0, False), (0.1, True), (-0.5, False), (0.02, False), (1e-6, False)])
def test_a_gain_is_paired_and_clear_above_its_error(shift, clear):
    paths, own = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    own -= own.mean()
    gain = Gain.from_paths(5 * paths + own + shift, 5 * paths)
    assert gain.nats == pytest.approx(shift, abs=1e-5)
    assert gain.stderr == pytest.approx(0.032, abs=0.003), "the spread of 5 nats is shared"
    assert gain.is_clear == clear


@pytest.mark.parametrize("gain", [Gain(0.0, 0.0), Gain(1e-6, 0.0), Gain(float("nan"), 0.1)])
def test_rounding_and_what_is_no_number_are_no_gain(gain):
    assert not gain.is_clear


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ({}, []),
        ({"reports": {"y": POOR}}, ["p̂ of y knows little"]),
        ({"accuracies": (0.25, 0.3)}, ["a perfect learner"]),
        ({"climbing": True}, ["still climbing"]),
        ({"cut": True}, ["cut short"]),
        ({"clipped": 0.6}, ["clips"]),
        ({"clipped": 0.01}, []),
        ({"reports": {"a": GOOD, "y": POOR}, "climbing": True, "clipped": 0.6}, ["p̂ of y", "too little time", "clips"]),
    ],
)
def test_only_causes_that_were_measured_are_named_in_their_order(about, named):
    usual = {"reports": {"y": GOOD}, "accuracies": (0.25, 0.9), "climbing": False, "cut": False, "clipped": None}
    causes = likely_causes(*{**usual, **about}.values())
    assert len(causes) == len(named)
    assert all(part in cause for part, cause in zip(named, causes, strict=True))


@pytest.mark.parametrize(
    ("learned", "cut", "code"), [(True, False, 0), (True, True, 0), (False, True, 0), (False, False, 3)]
)
def test_the_exit_code_and_the_line(learned, cut, code):
    verdict = Verdict(learned, Gain(-0.3, 0.2), Climb(0.5, 0.1, 30), ["p̂ is poor"], cut)
    scores = {name: {"accuracy": 0.25} for name in ("ctrl", "prior", "target")}
    metrics = {"learned": learned, "verdict": verdict.metrics(), **scores, "certificate": {"gap_nats": 11.0}}
    again = Verdict.from_metrics(metrics)
    assert again == verdict
    assert again.exit_code == code
    lines = again.lines(metrics, "runs/one")
    assert "J rose by 0.50 ± 0.10 nats over the last 30 updates" in lines[-1]
    assert lines[-1].endswith("ctrl train --resume runs/one --time 1h")
    assert len(lines) == (1 if learned else 2)
    assert learned or lines[0].startswith("not learned: J gained −0.30 ± 0.20 nats over the untrained control")
    assert all("\n" not in line for line in lines)


def test_metrics_of_before_count_as_learned():
    verdict = Verdict.from_metrics({})
    assert verdict.exit_code == 0
    assert verdict.lines({}) == []
