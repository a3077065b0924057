"""Which control of a training is kept."""

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.fit import cosine
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.state import NEAR, BestControl, Decay, Pace, ProbeHistory, TrainingState, decay_after


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


def curve(shifts, rewards=None, error=0.01):
    """Probes whose J is each of the shifts, the standard error of a difference between any two of them `error`."""
    generator, history = torch.Generator().manual_seed(0), ProbeHistory()
    shared, own = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    own = (own - own.mean()) / own.std() * error * 10  # over √100 paths
    for i, (shift, reward) in enumerate(zip(shifts, rewards or [0.0] * len(shifts), strict=True)):
        # two paths' own spreads are always alike but for the sign, a difference of which has that error
        history.add(10 * i, 5 * shared + own * (i % 2) + shift, 5 * shared + own * (i % 2) + reward)
    return history


def first_flat(shifts, patience, rewards=None, restarts=False):
    """The number of the first probe at which nothing is gained any more, or None."""
    rewards = rewards or [0.0] * len(shifts)
    prefixes = ((i, curve(shifts[: i + 1], rewards[: i + 1])) for i in range(len(shifts)))
    return next((i for i, history in prefixes if history.flat(patience, restarts)), None)


@pytest.mark.parametrize(
    ("shifts", "rewards", "restarts", "patience", "at"),
    [
        ([-9, -5, -4, -3, -2.0, -1, 0], None, False, 1, None),  # it gains
        ([-9, -5, -4, -3, -3.0, -3, -3], None, False, 1, 4),  # two probes alike
        ([-9, -5, -4, -3, -3.0, -3, -3], None, False, 2, 5),  # three
        ([-9, -5, -4, -3, -3.0, -3, -3], None, False, 4, None),  # not yet: the last is above the one four before
        ([-9, -5, -4, -3, -3.0, -3, -3, -3], None, False, 4, 7),
        ([0, -5, -5, -5, -5, -5], None, False, 4, 5),  # the first probe is not counted
        ([-9, -5, -5, -5, -5], None, False, 4, None),  # five of its own are needed
        ([0, -1, -2, -3, -4], [-9, -8, -7, -6, -5], False, 1, None),  # a warm start pays J for reward
        ([0, -1, -2, -3, -4], [-9, -8, -7, -7, -7], False, 1, 3),
        ([-9, -5, -4.995, -4.99, -4.985], None, False, 1, 2),  # within the standard error
        ([0, -2, -2, 1, 2, 2.0, 2, 2], None, True, 1, 5),  # two falls, each of which begins anew
        ([0, -2, -2, -2, -2, -2, -2], None, True, 1, None),  # falls alone halve the rate, again and again
        ([0, -2, -2, -2, -2, -2, -2], None, False, 1, 2),  # a learner that comes after another does not restart
    ],
)
def test_a_stage_is_flat_where_neither_j_nor_reward_gain(shifts, rewards, restarts, patience, at):
    assert first_flat([float(s) for s in shifts], patience, rewards, restarts) == at


def test_noise_rarely_makes_flat_what_climbs():
    """Of g a probe and noise s of the weights the gain over k probes is kg with a deviation of √2 s: at g = s, k = 4 it
    is below zero with Φ(−2.8) = 0.2 % a probe, of which six can be; at g = 0 with a half."""

    def ended(slope):
        count = 0
        for seed in range(200):
            whole = probes(slope=slope, weights=0.1, seed=seed)
            parts = [ProbeHistory(whole.updates[:i], whole.log_w[:i], whole.rewards[:i]) for i in range(1, 12)]
            count += any(part.flat(4) for part in parts)
        return count / 200

    assert ended(0.1) < 0.05
    assert ended(0.0) > 0.6


@pytest.mark.parametrize("limit", [*range(1, 40), 1000])
def test_a_rate_decays_to_zero_once_probes_are_flat_or_the_limit_is_near(limit):
    for flat_at in (None, *range(limit)):
        decay, updates, shares = None, 0, []
        while updates < (decay.end if decay else limit):
            decay = decay or decay_after(updates, limit, "flat" if updates == flat_at else None)
            shares.append(decay.share(updates) if decay else 1.0)
            updates += 1
        assert updates == decay.end <= limit
        assert shares[: decay.begin + 1] == [1.0] * (decay.begin + 1)
        falling = shares[decay.begin :]
        assert all(after < before for before, after in zip(falling, falling[1:], strict=False))
        assert decay.share(decay.end) == 0.0
        assert decay.reason == ("flat" if decay.begin == flat_at else NEAR)
        if decay.reason == NEAR:
            assert decay.end - decay.begin == max(1, limit // 5)
            assert updates == limit
        else:
            assert decay.end - decay.begin == min(max(1, flat_at // 4), limit - flat_at)


def paced(shifts, limit, every, **about):
    """Steps through a stage whose probes are of a curve; returns its state, its pace and the rate of each update."""
    training = TrainingState(BestControl(None))
    pace = Pace(training, limit, **{"patience": 2, "follows": True, "first": False, **about})
    training.history, whole, rates, update = curve(shifts[:1]), curve(shifts), [], 0
    pace.consider(0, probed=True)
    while not pace.has_ended(update):
        rates.append(pace.rate(update))
        update += 1
        is_probed = update % every == 0 and update < pace.end
        if is_probed:
            i = update // every
            training.history.add(update, whole.log_w[i], whole.rewards[i])
        pace.consider(update, is_probed)
    return training, pace, rates


CLIMBS, STANDS = [float(i) for i in range(40)], [0.0, *[3.0] * 39]


def test_a_stage_that_climbs_takes_its_limit_and_one_that_stands_ends_before():
    training, _, rates = paced(CLIMBS, limit=100, every=5)
    assert (len(rates), training.decay) == (100, Decay(80, 100, NEAR))
    training, _, rates = paced(STANDS, limit=100, every=5)
    assert training.decay == Decay(15, 18, "J and reward gained nothing over the last 2 probes")
    assert (len(rates), rates[:16]) == (18, [100 / (100 + i) for i in range(16)])
    assert paced(STANDS, limit=100, every=5, before=300)[2][:16] == [100 / (400 + i) for i in range(16)]
    assert training.climb is None, "it had stopped climbing"


def test_what_a_stage_climbs_is_read_before_its_rate_decays():
    """In the decay the noise of the weights vanishes, and J rises whatever is learned."""
    shifts = [0.0, *[1.0 + 0.1 * i for i in range(16)], *[50.0] * 10]
    training, _, _ = paced(shifts, limit=100, every=5)
    assert training.decay.begin == 80
    assert training.history.updates[-1] > 80
    climb = training.climb
    assert (climb.nats, climb.updates, climb.full_rate) == (pytest.approx(0.3, abs=0.02), 15, True)
    assert "before its rate decayed" in str(climb)


@pytest.mark.parametrize("follows", [True, False])
def test_without_a_patience_the_rate_is_the_cosine_to_the_bit(follows):
    training, pace, rates = paced([0.0, -9.0, *[-3.0] * 20], limit=100, every=5, patience=None, follows=follows)
    assert rates == [cosine(i, 100) for i in range(100)]
    assert (training.decay, pace.stopped) == (None, None)


@pytest.mark.parametrize("follows", [True, False])
def test_a_first_learner_that_falls_is_slowed_and_one_after_another_stops(follows):
    shifts = [0.0, -1.0, -1.0, -1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    _, pace, rates = paced(shifts, limit=50, every=5, follows=follows, first=True)
    whole = [100 / (100 + i) if follows else cosine(i, 50) for i in range(50)]
    slowed = [1.0] * 5 + [0.5] * 5 + [0.25] * 5 + [0.125] * 25
    assert rates[:40] == [share * slow for share, slow in zip(whole, slowed, strict=False)]
    assert not pace.slows, "the last probe has not fallen"
    _, pace, rates = paced(shifts, limit=50, every=5, follows=follows)
    assert (len(rates), set(rates) <= set(whole)) == (15, True)
    assert "lower than what it began with" in pace.stopped
