"""What metrics.json says of a whole run."""

from types import SimpleNamespace

import pytest

from ctrl_diffusion.evaluate.verdict import Gain
from ctrl_diffusion.run.metrics import verdict_of

GOOD = {"ink": {"nll": 0.4, "chance_nll": 1.39}}


def evaluation(gain, prior, ctrl, target):
    scores = {
        name: SimpleNamespace(accuracy=accuracy, accuracy_stderr=0.01)
        for name, accuracy in {"prior": prior, "ctrl": ctrl, "target": target}.items()
    }
    return SimpleNamespace(**scores, gained=Gain(gain, 0.1), clipped=None)


@pytest.mark.parametrize(
    ("gain", "prior", "ctrl", "target", "learned"),
    [
        (2.0, 0.25, 0.90, 0.95, True),
        (2.0, 0.25, 0.25, 0.95, False),  # only its surest misses are less sure
        (2.0, 0.25, 0.26, 0.95, False),  # within the error
        (-1.0, 0.25, 0.90, 0.95, False),  # right, at a price above what it earns
        (2.0, 0.95, 0.95, 0.955, True),  # nothing to be had
    ],
)
def test_a_control_has_learned_if_j_and_what_is_right_rose(gain, prior, ctrl, target, learned):
    assert verdict_of(evaluation(gain, prior, ctrl, target), GOOD, [{}, {}], False).learned is learned
