"""Hold bounds and standard errors against what 200 repeats of the same measurement give.

Prior samples and paths are drawn from toys whose log Z and J are known. A spread of n repeats is known to 1/√(2n): 5 %.
"""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.evaluate.certificate import Slope, certify, log_z
from ctrl_diffusion.evaluate.evaluation import Evaluation, largest_by_chance
from ctrl_diffusion.evaluate.judge import Observation
from ctrl_diffusion.evaluate.scores import Nulled, score_samples, score_target
from ctrl_diffusion.evaluate.verdict import Gain

REPEATS, PATHS = 200, 50
SURE = math.log(0.99)  # log p̂ where x has y


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator)


def rare(share, members, floor, policy, spread=1.0):
    """Certify a y that a share of x has, once for each of 200 repeats, numbered by c; return it with the true gap.

    p̂ is sure of every x: the floor, or log 0.99. The log w of a good policy are normal, with a gap of spread²/2;
    the other policy is the prior where x lacks y.
    """
    generator = torch.Generator().manual_seed(0)
    has_y = torch.rand(REPEATS, members, 1, generator=generator) < share
    table = torch.where(has_y, SURE, floor)
    true = math.log(share * math.exp(SURE) + (1 - share) * math.exp(floor))
    if policy == "good":
        log_w = true - spread**2 / 2 + spread * normal(REPEATS, PATHS, generator=generator)
        reward, gap = torch.full_like(log_w, SURE), spread**2 / 2
    else:
        reward = torch.full((REPEATS, PATHS), floor)
        log_w, gap = reward + math.log(1 - share), true - floor - math.log(1 - share)
    conditions = Conditions({"c": torch.arange(REPEATS)}, {"y": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = reward.flatten(), torch.zeros(reward.numel()), (reward - log_w).flatten()
        return certify(conditions, table, *arguments), gap


@pytest.mark.parametrize("policy", ["good", "never makes y"])
@pytest.mark.parametrize("floor", [-9.0, -14.0])
@pytest.mark.parametrize("members", [500, 1000])
@pytest.mark.parametrize("share", [0.001, 0.003, 0.01, 0.02])
def test_a_bound_on_a_rare_y_holds_or_is_not_given(share, members, floor, policy):
    """Low by two standard errors of a normal are 2.3 %; at most 5 % of the repeats, the bar, for skewed counts, too."""
    found, gap = rare(share, members, floor, policy)
    low = found.pairs.gap + 2 * found.pairs.stderr < gap
    assert int((low & found.certified).sum()) <= 0.05 * REPEATS
    assert int((low & found.on_paths).sum()) <= 0.05 * REPEATS
    assert found.pairs.gap[~found.certified & ~found.on_paths].isnan().all()
    if share * members < 3.5:
        assert int(found.certified.sum()) <= 2
    if policy != "good":
        assert not found.on_paths.any(), "no path has y"


@pytest.mark.parametrize("share", [0.03, 0.1, 0.25])
def test_ordinary_shares_are_certified(share):
    """With 1,000 samples: 30 hits and more, of which fewer than ten come in one of a hundred thousand counts."""
    found, gap = rare(share, 1000, -9.0, "good")
    assert found.certified.all()
    assert found.gap == pytest.approx(gap, abs=4 * found.stderr)


@pytest.mark.parametrize("policy", ["good", "never makes y"])
def test_a_floor_that_counts_as_hits_does_not_hide_a_rare_y(policy):
    """A thousand times p̂ = 0.011 are eleven hits, and a sample that has y comes once in a thousand."""
    found, gap = rare(0.001, 1000, -4.5, policy)
    assert found.certified.all()
    assert int((found.pairs.gap + 2 * found.pairs.stderr < gap).sum()) <= 0.05 * REPEATS


def eighty(absent, generator, members=500):
    """Certify 20 conditions and four labels, even but for one pair that no prior sample has."""
    label = torch.randint(4, (20, members, 1), generator=generator)
    if absent:
        label[7] = torch.where(label[7] == 2, 1, label[7])
    table = torch.where(label == torch.arange(4), SURE, -14.0)
    log_w = math.log(0.25) - 0.5 + normal(80 * 25, generator=generator)
    arguments = table, torch.full_like(log_w, SURE), torch.zeros_like(log_w), SURE - log_w
    names = {"c": [f"dog {i}" for i in range(20)], "tone": ["light", "even", "dark", "black"]}
    return certify(Conditions({"c": torch.arange(20)}, {"tone": 4}, names=names), *arguments)


@pytest.mark.parametrize("absent", [True, False])
def test_one_absent_pair_of_eighty_is_said(absent):
    """In 100 of 100 runs where it is absent, by its name; else once in a few hundred."""
    generator, said = torch.Generator().manual_seed(1), 0
    for _ in range(100):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = eighty(absent, generator)
        lines = [str(each.message) for each in caught]
        said += any("c = dog 7, tone = dark (0.0 hits)" in line for line in lines)
        assert all("\n" not in line for line in lines)
        assert found.certified[30] != absent or not absent
        assert found.gap == pytest.approx(0.5, abs=5 * found.stderr)
        if absent:
            assert "c = dog 7, tone = dark" in found.uncertified
            assert found.metrics()["certified_pairs"] == 80 - len(found.uncertified)
            assert found.metrics()["pairs"]["rests_on"][30] == ("policy" if found.on_paths[30] else None)
    assert said == (100 if absent else 0)


GROUPS, MEMBERS, CLASSES, EACH = 2, 600, 4, 25
PAIRS = GROUPS * CLASSES


def drawn(n, generator, sure):
    """Draw n rows of x: log p̂ (n, 4) of its label, the label, and a second label that goes with the first."""
    label = torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), n, replacement=True, generator=generator)
    log_p = (sure * F.one_hot(label, CLASSES) + normal(n, CLASSES, generator=generator)).log_softmax(1)
    other = (torch.rand(n, generator=generator) < 0.2 + 0.2 * label).long()
    return log_p, label, other


def repeat(sure, seed):
    """Measure a policy once, and return every reported figure with its reported standard error."""
    generator = torch.Generator().manual_seed(seed)
    conditions = Conditions({"c": torch.arange(GROUPS)}, {"y": CLASSES})
    log_p, label, other = drawn(GROUPS * MEMBERS, generator, sure)
    table, features = log_p.view(GROUPS, MEMBERS, CLASSES), torch.zeros(len(log_p), 1)
    _, came, came_other = drawn(PAIRS * EACH, generator, sure)
    # some y come more often than others; the policy misses most modes, so that all pairs rest on the prior
    asked = conditions.all(EACH) % CLASSES
    came = torch.where(torch.rand(len(asked), generator=generator) < 0.2 + 0.25 * asked, asked, came)
    reward = -0.5 - 0.2 * normal(len(asked), generator=generator).square()
    log_w = -4.0 - 0.3 * asked + (0.3 + 0.2 * asked) * normal(len(asked), generator=generator)
    before = log_w - 0.5 - 0.5 * asked + 0.1 * normal(len(asked), generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = certify(conditions, table, reward, torch.zeros_like(reward), reward - log_w)
    target = score_target(Observation({"y": label}, {}, features, None, None), table, conditions)
    ctrl = score_samples(Observation({"y": came}, {}, torch.zeros(len(came), 1), None, (came == 0).float()), conditions)
    share = MEMBERS // CLASSES
    every = {"prior": other.view(GROUPS, -1)[:, : share * CLASSES].flatten(), "target": other, "ctrl": came_other}
    nulled, slope = Nulled.from_labels(every, 2, table), Slope.at(1.0, table, reward)
    gained, (mean_z, z_error) = Gain.from_paths(log_w, before, PAIRS), log_z(table)
    figures = {
        "J": (found.objective, found.objective_stderr), "log Z": (found.log_z, found.log_z_stderr),
        "log Z, alone": (float(mean_z.mean()), z_error), "gap": (found.gap, found.stderr),
        "log Z, policy": (found.log_z_policy, found.log_z_policy_stderr),
        "slope": (slope.log_z, slope.log_z_stderr), "log p̂": (slope.log_p, slope.log_p_stderr),
        "gained": (gained.nats, gained.stderr),
        "target": (target.accuracy, target.accuracy_stderr), "accuracy": (ctrl.accuracy, ctrl.accuracy_stderr),
        "one control": (ctrl.accuracy_of["y"], ctrl.stderr_of["y"]),
        "outside": (ctrl.outside_support, ctrl.outside_stderr),
        "log Z of a pair": (float(found.pairs.log_z[3]), float(found.pairs.log_z_stderr[3])),
        "gap of a pair": (float(found.pairs.gap[3]), float(found.pairs.stderr[3])),
    }  # fmt: skip
    return figures | {
        f"nulled, {kind}": (float(nulled.shares[kind][1]), float(nulled.stderr[kind][1])) for kind in every
    }


@pytest.mark.parametrize("sure", [1.0, 12.0])
@pytest.mark.parametrize("even", [False, True])
def test_log_z_is_hardly_biased_at_the_default_sizes(sure, even):
    """Ten conditions, four labels, 1,000 samples, 200 times: the mean error is known to a fourteenth of one's."""
    generator, errors, stated = torch.Generator().manual_seed(2), [], []
    shares = torch.full((4,), 0.25) if even else torch.tensor([0.05, 0.15, 0.3, 0.5])
    p = (sure * torch.eye(4)).log_softmax(1)  # of each label
    true = float((shares @ p.exp()).log().mean())
    for _ in range(REPEATS):
        label = torch.multinomial(shares, 10_000, replacement=True, generator=generator)
        z, stderr = log_z(p[label].view(10, 1000, 4))
        errors.append(float(z.mean()) - true)
        stated.append(stderr)
    errors, stated = torch.tensor(errors), torch.tensor(stated)
    assert abs(float(errors.mean())) < float(stated.mean()) / 2
    assert float(stated.square().mean().sqrt() / errors.std()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("sure", [1.0, 3.0, 12.0])
def test_every_standard_error_is_the_spread_of_repeats(sure):
    """Of p̂ that is vague, usual, and certain; to 20 %, four errors of what 200 repeats know of a spread."""
    repeats = [repeat(sure, seed) for seed in range(REPEATS)]
    ratios = {}
    for name in repeats[0]:
        value, error = torch.tensor([figures[name] for figures in repeats], dtype=torch.float64).unbind(1)
        ratios[name] = float(error.square().mean().sqrt() / value.std())
    assert not {name: ratio for name, ratio in ratios.items() if not 0.8 < ratio < 1.2}, ratios


def test_the_largest_shift_of_nothing_is_what_chance_gives():
    """A maximum of noisy differences is no zero: its mean over repeats is said beside it."""
    errors = torch.tensor([0.01, 0.02, 0.015, 0.005])
    shifts = errors * normal(4000, 4, generator=torch.Generator().manual_seed(0))
    largest = shifts.abs().amax(1)
    # the mean of 4,000 to four of its errors
    assert largest_by_chance(errors) == pytest.approx(float(largest.mean()), abs=4 * float(largest.std()) / 4000**0.5)
    assert largest_by_chance(torch.zeros(2)) == 0.0


def test_a_shift_is_reported_with_its_error():
    """Two controls: each nulled alone, the other's accuracy beside that of both at once."""

    def score(ink, slant, error):
        return SimpleNamespace(accuracy_of={"ink": ink, "slant": slant}, stderr_of={"ink": error, "slant": error})

    def part(name, other, accuracy):
        ctrl = SimpleNamespace(accuracy_of={name: accuracy}, stderr_of={name: 0.04})
        return SimpleNamespace(ctrl=ctrl, nulled={other: None})

    parts = {("ink",): part("ink", "slant", 0.9), ("slant",): part("slant", "ink", 0.6)}
    both = Evaluation(None, None, score(0.92, 0.7, 0.03), None, 0, parts=parts)
    shifts, errors = both.null_shifts
    torch.testing.assert_close(shifts, torch.tensor([-0.02, -0.1], dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(errors, torch.tensor([0.05, 0.05], dtype=torch.float64), rtol=0, atol=1e-9)
