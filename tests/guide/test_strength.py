"""The grid of strengths: it widens until the best lies inside, and what it turns is the exact tilt by p̂^w."""

import math

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.exact.lattice import LatticeChain
from ctrl_diffusion.exact.mixtures import GaussianMixture, Logistic
from ctrl_diffusion.guide.particles import TDS, FeynmanKac
from ctrl_diffusion.guide.selection import BestOf, Importance, Rejection
from ctrl_diffusion.guide.strength import Knob
from ctrl_diffusion.reward.reward import Reward

DOUBLE = torch.float64


def widened(knob, grid, *scores):
    """Try a grid and what it is widened by; scores are functions of the value."""
    tried = {value: [score(value) for score in scores] for value in grid}
    while (value := knob.wider(tried)) is not None:
        assert value not in tried
        tried[value] = [score(value) for score in scores]
    return tried


def peak(at):
    return lambda value: -abs(math.log(value / at))


@pytest.mark.parametrize("at", [0.06, 0.1, 0.3, 0.9, 1.0, 3.0, 7.0, 25.0])
@pytest.mark.parametrize("grid", [(0.5, 1.0, 2.0, 4.0), (1.0,), (4.0, 0.5), (3.0, 5.0)])
def test_a_best_between_the_bounds_ends_inside_within_a_factor_of_two(at, grid):
    knob = Knob()
    tried = widened(knob, grid, peak(at))
    best = knob.best(tried)
    assert min(tried) < best < max(tried)
    assert not knob.on_edge(tried)
    near = [value for value in tried if value / 2 <= at <= 2 * value]
    assert best in near or {*grid} >= {*tried}, "or the grid itself is coarser than that"


@pytest.mark.parametrize(("at", "edge"), [(1e-6, 1 / 64), (1e6, 64.0)])
def test_a_best_beyond_the_bounds_is_said(at, edge):
    tried = widened(Knob(), (0.5, 1.0, 2.0, 4.0), peak(at))
    assert Knob().on_edge(tried) == [edge]
    assert len(tried) <= 4 + 5, "it stops"


def test_every_criterion_widens_it_and_one_that_was_not_measured_does_not():
    knob = Knob()
    both = widened(knob, (0.5, 1.0), peak(3.0), peak(0.1))
    assert min(both) < 0.125 < 4.0 <= max(both)
    alone = widened(knob, (0.5, 1.0, 2.0), peak(1.0), lambda value: None)
    assert {*alone} == {0.5, 1.0, 2.0}
    assert knob.best(alone, 1) is None
    assert knob.best({1.0: [math.nan], 2.0: [0.0]}) == 2.0


def test_of_equals_the_nearest_to_one_is_best_and_nothing_is_widened():
    tried = widened(Knob(), (0.5, 1.0, 2.0), lambda value: 0.0)
    assert (Knob().best(tried), len(tried)) == (1.0, 3)


def test_what_cannot_be_sampled_ends_the_grid():
    """A best below a value that failed lies inside: nothing beyond a failure can be sampled."""
    tried = {1.0: [0.1], 2.0: [0.5], 4.0: None}
    assert Knob().wider(tried) is None
    assert Knob().on_edge(tried) == []


def test_a_whole_number_stays_one_and_the_prior_is_no_edge():
    knob = Knob("n", (2, 4), 1, 64, off=1)
    down = widened(knob, knob.grid, peak(1))
    assert {*down} == {1, 2, 4}
    assert all(type(value) is int for value in down)
    assert knob.on_edge(down) == [], "below the prior there is nothing"
    zero = widened(Knob(), (0.0, 1.0), lambda value: -value)
    assert {*zero} == {0.0, 1.0}


@pytest.mark.parametrize(
    "method",
    [TDS(particles=16), FeynmanKac(particles=16), Importance(particles=16), Rejection()],
    ids=lambda method: type(method).__name__,
)
def test_turning_up_is_tempering(method):
    """At w the mean reward is that of the target tilted by p̂^w, which rises with w: dE_w[r]/dw = Var_w[r].

    Of R runs of n samples the mean has the error of a run over √R; the bias of self-normalised weights is of the order
    of their variance over the 4,096 particles of rewards of order one.
    """
    prior = GaussianMixture(torch.tensor([[-1.0], [0.8]], dtype=DOUBLE), 0.4, Cosine())
    likelihood, times = Logistic(torch.ones(1, dtype=DOUBLE), steepness=1.0), Cosine().times(6, 0.1)
    chain = LatticeChain(prior, times, radius=1.0, spread=0.4)
    earned, n = likelihood.log_prob(chain.x_0)[:, 1], 256
    labels, generator = {"y": torch.ones(n, dtype=torch.long)}, torch.Generator().manual_seed(0)
    exact, errors = [], []
    for w in (0.25, 1.0, 4.0):
        exact.append(float(chain.log_target(w * earned).exp() @ earned))
        means = []
        for _ in range(12):
            x_0 = method(prior, Reward({"y": likelihood}), labels, None, times, generator, w).x_0
            means.append(likelihood.log_prob(x_0)[:, 1].mean())
        means = torch.stack(means)
        errors.append(4 * float(means.std()) / 12**0.5 + 1 / 4096)
        assert float(means.mean()) == pytest.approx(exact[-1], abs=errors[-1])
    assert exact[0] + max(errors) < exact[1] < exact[2] - max(errors), "the error is small enough to tell them apart"


def test_the_best_of_n_does_not_see_the_strength_but_n():
    prior = GaussianMixture(torch.tensor([[-1.0], [0.8]]), 0.4, Cosine())
    labels, times, reward = (
        {"y": torch.ones(50, dtype=torch.long)},
        Cosine().times(4, 0.1),
        Reward({"y": Logistic(torch.ones(1))}),
    )

    def best(n, w):
        return BestOf(n=n)(prior, reward, labels, None, times, torch.Generator().manual_seed(0), w).x_0

    assert torch.equal(best(4, 1.0), best(4, 8.0))
    assert best(2, 1.0).mean() < best(8, 1.0).mean() < best(32, 1.0).mean()
