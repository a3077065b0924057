"""Which control of a training is kept."""

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.state import BestControl, ProbeHistory


def test_a_control_whose_j_is_no_number_is_not_kept():
    prior = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3, Cosine())
    best = BestControl(Policy(prior, SideControl("y", ("a", "b"), prior, width=4)))
    good, bad = torch.randn(2, 160, generator=torch.Generator().manual_seed(0))
    bad[3] = float("nan")
    assert best.consider({"stage": "adjoint", "J": 0.0}, good, good)
    for earned in (good, bad):
        assert not best.consider({"stage": "adjoint", "J": float("nan"), "averaged": True}, bad, earned)
    assert "diverged" in best.divergence({"stage": "adjoint", "J": float("nan")})


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


def probes(slope, weights, seed, reward=0.0, n=11):
    """The probes of a stage whose J climbs by `slope` a probe, with noise of the weights and of paths that share it."""
    generator = torch.Generator().manual_seed(seed)
    paths, history = 5 * torch.randn(160, generator=generator), ProbeHistory()
    for i in range(n):
        j = slope * i + weights * float(torch.randn((), generator=generator))
        own = 0.01 * torch.randn(160, generator=generator)
        history.add(i, j + paths + own, reward * i + paths)
    return history


def stops(patience, **about):
    """The share of stages that a patience ends before their last probe."""
    ended = 0
    for seed in range(200):
        whole = probes(seed=seed, **about)
        parts = (
            ProbeHistory(*(part[:i] for part in (whole.updates, whole.log_w, whole.rewards))) for i in range(1, 11)
        )
        ended += any(part.standstill(patience) for part in parts)
    return ended / 200


def test_noise_rarely_stops_a_learner_that_climbs_and_one_that_stands_still_stops():
    """The derivation of the default, 4: at g = s/2 each of three probes stops it with 0.2 %."""
    assert Config.model_fields["patience"].default == 4
    assert stops(4, slope=0.05, weights=0.1) < 0.02
    assert stops(4, slope=0.0, weights=0.1) > 0.5
    assert stops(2, slope=0.05, weights=0.1) > stops(3, slope=0.05, weights=0.1) > stops(4, slope=0.05, weights=0.1)
    assert stops(3, slope=-0.5, weights=0.1) == 1
    assert stops(3, slope=-0.5, weights=0.1, reward=0.2) == 0, "a warm start pays J for reward"
    assert stops(None, slope=-0.5, weights=0.1) == 0


@pytest.mark.parametrize("first", [-9.0, 0.0, 9.0])
def test_the_probe_before_a_stage_begins_is_not_counted(first):
    """It is of the stage before, whose averaged weights lack the noise of those that follow."""
    slope, history = 0.02, ProbeHistory()
    for i in range(9):
        j = torch.full((10,), slope * i if i else first)
        history.add(i, j, torch.zeros(10))
        assert history.standstill(4) is None, "eight probes of its own climb"
    still = ProbeHistory()
    for i in range(9):
        assert still.standstill(4) is None, "two windows of four take eight probes of its own"
        still.add(i, torch.full((10,), 0.0 if i else first), torch.zeros(10))
    assert still.standstill(4)


def test_a_climb_is_the_paired_gain_of_the_last_probes():
    climb = probes(slope=0.5, weights=0.0, seed=0).climb()
    assert climb.nats == pytest.approx(1.5, abs=0.01)
    assert climb.stderr < 0.01, "5 nats of spread between paths are shared"
    assert climb.updates == 3
    assert climb.gain.is_clear
    assert not probes(slope=0.0, weights=0.0, seed=0).climb().gain.is_clear
    assert probes(slope=0.5, weights=0.0, seed=0, n=1).climb() is None


def test_a_history_is_restored_to_the_bit():
    history = probes(slope=0.5, weights=1.0, seed=0)
    again = ProbeHistory.from_tensors(history.tensors())
    assert again.updates == history.updates
    assert all(map(torch.equal, again.log_w + again.rewards, history.log_w + history.rewards))
    assert ProbeHistory.from_tensors(ProbeHistory().tensors()).updates == []


@pytest.mark.parametrize(
    ("shifts", "lost"),
    [
        ([0.0, -1.0, -1.0, -0.5], True),
        ([0.0, -1.0, -1.0, -0.5, 2.0], False),  # it has come back
        ([0.0, 0.5, -1.0, -1.0, -0.5], True),  # it was better once
        ([0.0, -1.0, -1.0], False),  # not yet
        ([0.0, -1.0, 0.0, -1.0], False),
        ([0.0, -0.1, -0.1, -0.1], False),  # within two errors
        ([0.0, 1.0, 1.0, 1.0], False),
    ],
)
def test_a_learner_that_loses_what_another_has_learned_stops(shifts, lost):
    """Each probe has paths of the same noise, 5 nats wide, and of its own, 1 nat: an error of 0.14 in 100 paths."""
    generator, history = torch.Generator().manual_seed(0), ProbeHistory()
    shared = 5 * torch.randn(100, generator=generator)
    for i, shift in enumerate(shifts):
        own = torch.randn(100, generator=generator)
        history.add(i, shared + own - own.mean() + shift, shared)
    assert (history.loss() is not None) is lost


def test_a_probe_has_fallen_where_it_is_clearly_below_the_first():
    """Paths share their noise: what they share is no error."""
    shared, own = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    own, history = 0.1 * (own - own.mean()) / own.std(), ProbeHistory()  # of standard error 0.01
    for i, j in enumerate((0.0, 0.5, -0.019, -0.021, -3.0)):
        history.add(i, j + 5 * shared + own * (i > 0), torch.zeros(100))
    assert history.falls == [False, False, True, True]
    assert history.rate_share == 0.25
