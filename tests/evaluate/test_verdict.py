"""When a control counts as learned, and what is said of one that does not."""

import pytest
import torch

from ctrl_diffusion.evaluate.verdict import Climb, Gain, Verdict, gap_line, likely_causes

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
@pytest.mark.parametrize("full_rate", [False, True])
def test_the_exit_code_and_the_line(learned, cut, code, full_rate):
    verdict = Verdict(learned, Gain(-0.3, 0.2), Climb(0.5, 0.1, 30, full_rate), ["p̂ is poor"], cut)
    scores = {name: {"accuracy": 0.25} for name in ("ctrl", "prior", "target")}
    metrics = {
        "learned": learned,
        "verdict": verdict.metrics(),
        **scores,
        "certificate": {"gap_nats": 11.0, "gap_stderr": 0.1},
    }
    again = Verdict.from_metrics(metrics)
    assert again == verdict
    assert again.exit_code == code
    lines = again.lines(metrics, "runs/one")
    rose = "J rose by 0.50 ± 0.10 nats over the last 30 updates"
    assert f"{rose}{' before its rate decayed' if full_rate else ''}; go on with" in lines[-1]
    assert lines[-1].endswith("ctrl train --resume runs/one --time 1h")
    assert len(lines) == (1 if learned else 2)
    assert learned or lines[0].startswith("not learned: J gained −0.30 ± 0.20 nats over the untrained control")
    assert all("\n" not in line for line in lines)
    assert learned or "gap to the exact conditional at most 11.0 ± 0.1 nats. Likely: p̂ is poor." in lines[0]


@pytest.mark.parametrize("apart", [None, {"pairs": 2, "gap_nats": 0.4, "gap_stderr": 0.1}])
@pytest.mark.parametrize("gap", [None, 0.88])
def test_what_is_not_certified_is_named_beside_the_gap(gap, apart):
    names = [f"y = {i}" for i in range(6)]
    certificate = {"gap_nats": gap, "gap_stderr": 0.04, "certified_pairs": 74, "of_pairs": 80, "on_paths": apart}
    line = gap_line({**certificate, "uncertified": names})
    some = (
        "at most 0.88 ± 0.04 nats over 74 of 80 (c, y); nothing is certified for y = 0; y = 1; y = 2; y = 3; and 2 more"
    )
    assert line.startswith("not certified for any of 6 (c, y)" if gap is None else some)
    assert ("0.40 ± 0.10 nats for 2 of these by the policy's own paths" in line) == (apart is not None)
    whole = {"gap_nats": 0.88, "gap_stderr": 0.04}
    assert gap_line(whole) == gap_line({**whole, "uncertified": []}) == "at most 0.88 ± 0.04 nats"


def test_an_unknown_target_is_said_and_blames_nothing():
    verdict = Verdict(False, Gain(-0.3, 0.2), None, [], False)
    scores = {name: {"accuracy": None if name == "target" else 0.25} for name in ("ctrl", "prior", "target")}
    certificate = {"gap_nats": None, "gap_stderr": None, "uncertified": ["y = 0"], "on_paths": None}
    lines = verdict.lines({"verdict": verdict.metrics(), **scores, "certificate": certificate})
    assert "not known a perfect learner's; gap to the exact conditional not certified for any of 1 (c, y)" in lines[0]
    assert likely_causes({"y": GOOD}, (0.25, float("nan")), False, False, None) == []


def test_a_gain_of_several_pairs_has_the_error_within_them():
    """Pairs that gain unequally have as many paths each: what lies between them is no error."""
    gains = torch.tensor([0.0, 10.0]).repeat_interleave(500)
    own = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    gain = Gain.from_paths(gains + own, torch.zeros(1000), 2)
    assert gain.nats == pytest.approx(5, abs=0.1)
    assert gain.stderr == pytest.approx(1000**-0.5, rel=0.1)  # a spread of 1,000 is known to 2 %


def test_metrics_of_before_count_as_learned():
    verdict = Verdict.from_metrics({})
    assert verdict.exit_code == 0
    assert verdict.lines({}) == []
