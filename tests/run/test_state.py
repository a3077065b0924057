"""Which control of a training is kept."""

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.run.state import BestControl


def test_a_control_whose_j_is_no_number_is_not_kept():
    prior = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3, Cosine())
    best = BestControl(Policy(prior, SideControl("y", ("a", "b"), prior, width=4)))
    good, bad = torch.randn(2, 160, generator=torch.Generator().manual_seed(0))
    bad[3] = float("nan")
    assert best.consider({"stage": "adjoint", "J": 0.0}, good, good)
    for earned in (good, bad):
        assert not best.consider({"stage": "adjoint", "J": float("nan"), "averaged": True}, bad, earned)
    assert "diverged" in best.reason_to_stop({"stage": "adjoint", "J": float("nan")}, 1, None)


@pytest.mark.parametrize(
    ("rewards", "averaged", "kept"),
    [
        ([-9.0, -3.0, -1.0, -1.5], -2.98, 2),  # averaged, J up by less than the noise, but reward lost
        ([-9.0, -3.0, -1.0, -1.01], -2.98, 3),  # reward as good as the same
        ([-9.0, -3.0, -1.0, -1.01], -3.01, 3),  # averaged weights win a draw
        ([-9.0, -3.0, -1.0, -1.01], -3.10, 2),  # but not a loss
        ([-9.0, -3.0, -3.5, -3.0], -2.98, 3),
        ([-9.0, -3.0, -3.5, -3.55], -2.90, 3),  # less reward for a clear gain in J that is worth it,
        ([-9.0, -3.0, -3.5, -3.75], -2.90, 2),  # not for one that is not,
        ([-9.0, -3.0, -3.5, -3.55], -2.98, 2),  # nor for an unclear one
    ],
)
def test_the_best_control_is_kept(rewards, averaged, kept):
    prior = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3, Cosine())
    policy = Policy(prior, SideControl("y", ("a", "b"), prior, width=4))
    best, noise = BestControl(policy), torch.randn(160, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean()
    for number, (j, reward) in enumerate(zip((-9.0, -5.0, -3.0, averaged), rewards, strict=True)):
        with torch.no_grad():
            policy.trainable()[0].fill_(number)
        # the paths' own spread is shared, all but 0.3 each: the standard error of a difference is 0.03
        own = 0.3 * torch.randn(160, generator=torch.Generator().manual_seed(number))
        record = {"update": number, "J": j} | ({"averaged": True} if number == 3 else {})
        best.consider(record, j + 5 * noise + own - own.mean(), reward + 4 * noise + own - own.mean())
    with torch.no_grad():
        policy.trainable()[0].fill_(9)
    policy.restore(best.snapshot)
    assert best.record["update"] == kept
    assert (policy.trainable()[0] == kept).all()
