import math

import pytest
import torch

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.exact.lattice import LatticeChain
from ctrl_diffusion.exact.mixtures import GaussianMixture, Logistic
from ctrl_diffusion.guide.selection import BestOf, Rejection
from ctrl_diffusion.reward.reward import Reward

DOUBLE = torch.float64


def setting():
    prior = GaussianMixture(torch.tensor([[-1.0], [0.8]], dtype=DOUBLE), 0.4, Cosine())
    return prior, Logistic(torch.ones(1, dtype=DOUBLE), steepness=2.5), Cosine().times(6, 0.1)


def test_the_best_of_one_is_the_prior():
    prior, likelihood, times = setting()
    labels = {"y": torch.ones(9, dtype=torch.long)}
    found = BestOf(n=1)(prior, Reward({"y": likelihood}), labels, None, times, torch.Generator().manual_seed(0))
    plain = paths(prior, 9, times, torch.Generator().manual_seed(0)).x_0
    assert torch.equal(found.x_0, plain)


def test_the_best_of_n_is_the_maximum():
    """A reward that grows with x: P(best ≤ x) = F(x)^n of the prior's own samples."""
    prior, likelihood, times = setting()
    labels, n = {"y": torch.ones(4000, dtype=torch.long)}, 3
    found = BestOf(n=n)(prior, Reward({"y": likelihood}), labels, None, times, torch.Generator().manual_seed(0)).x_0
    plain = paths(prior, 40_000, times, torch.Generator().manual_seed(1)).x_0
    for x in (-0.5, 0.3, 1.0):
        share = float((plain <= x).double().mean())
        # a share of 4,000 is known to 0.008 at most, the prior's of 40,000, to the power of 3, to 3 · 0.0025
        assert float((found <= x).double().mean()) == pytest.approx(share**n, abs=4 * (0.008**2 + 0.0075**2) ** 0.5)


@pytest.mark.parametrize("bound", [0.0, 0.7])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_what_is_accepted_is_the_exact_tilt_and_costs_one_over_the_share_accepted(strength, bound):
    prior, likelihood, times = setting()
    n = 2000
    labels, generator = {"y": torch.ones(n, dtype=torch.long)}, torch.Generator().manual_seed(0)
    found = Rejection(bound=bound)(prior, Reward({"y": likelihood}), labels, None, times, generator, strength)
    chain = LatticeChain(prior, times, radius=1.0, spread=0.4)
    reward = strength * likelihood.log_prob(chain.x_0)[:, 1]
    target, x_0 = chain.log_target(reward).exp(), chain.x_0[:, 0]
    for power in (1, 2):
        exact, second = float(target @ x_0**power), float(target @ x_0 ** (2 * power))
        error = ((second - exact**2) / n) ** 0.5
        assert float((found.x_0**power).mean()) == pytest.approx(exact, abs=4 * error)
    accepted = torch.tensor(chain.log_z(reward) - strength * bound).exp().item()
    # tries of a sample are geometric: mean 1/p, variance (1 − p)/p²
    error = (1 - accepted) ** 0.5 / accepted / n**0.5
    assert found.cost.classifier_evaluations == pytest.approx(1 / accepted, abs=4 * error)
    assert found.cost.network_evaluations == pytest.approx(len(times) * found.cost.classifier_evaluations)


class OfAScale:
    """p̂ of a place y on a scale, N(y; x, std²), as a fitted `Gaussian` head has it."""

    def __init__(self, std):
        self.std = std

    def log_prob_at(self, x, y):
        return torch.distributions.Normal(x[:, 0], self.std).log_prob(y.to(x))


class Bounded(OfAScale):
    @property
    def bound(self):
        return float(torch.distributions.Normal(0.0, self.std).log_prob(torch.zeros(())))


@pytest.mark.parametrize("std", [0.15, 0.6])  # densities of up to 2.7 and of at most 0.66
@pytest.mark.parametrize(("gamma", "strength"), [(1.0, 1.0), (0.5, 2.0), (1.0, 0.5)])
def test_a_place_on_a_scale_is_accepted_by_the_density_there_is_at_most(std, gamma, strength):
    """The prior N(0, 1) on one step is exact: N(x; y, std²)^u of it has precision 1 + u/std², u = γ w.

    Accepted is Z e^(−w γ bound) = E[exp(−u (x − y)²/(2 std²))] = √(std²/(std² + u)) exp(−u y²/(2 (std² + u))).
    """
    prior = GaussianMixture(torch.zeros(1, 1, dtype=DOUBLE), 1.0, Cosine())
    reward, n, u, y = Reward({"y": Bounded(std)}, gamma), 2000, gamma * strength, 0.7
    labels, times = {"y": torch.full((n,), y)}, Cosine().times(200, 0.02)
    found = Rejection(batch=4096)(prior, reward, labels, None, times, torch.Generator().manual_seed(0), strength)
    precision = 1 + u / std**2
    mean, deviation = u * y / std**2 / precision, precision**-0.5
    # a chain of 200 steps has the mean and, to a hundredth, the deviation of the prior
    assert float(found.x_0.mean()) == pytest.approx(mean, abs=4 * deviation / n**0.5 + 0.01)
    assert float(found.x_0.std()) == pytest.approx(deviation, rel=4 / (2 * n) ** 0.5 + 0.01)
    accepted = (std**2 / (std**2 + u)) ** 0.5 * math.exp(-u * y**2 / (2 * (std**2 + u)))
    error = (1 - accepted) ** 0.5 / accepted / n**0.5
    assert found.cost.classifier_evaluations == pytest.approx(1 / accepted, rel=0.02, abs=4 * error)
    if std < 0.4:
        with pytest.raises(ValueError, match="above the bound 0"):
            Rejection(bound=0.0)(prior, reward, labels, None, times, torch.Generator(), strength)


def test_a_density_that_does_not_say_its_bound_is_refused():
    prior, _, times = setting()
    labels = {"y": torch.full((5,), 0.3)}
    with pytest.raises(ValueError, match="p̂ of 'y' is a density, which may exceed 1, and OfAScale does not say"):
        Rejection()(prior, Reward({"y": OfAScale(0.2)}), labels, None, times, torch.Generator())


def test_a_bound_that_is_none_and_tries_that_do_not_do_are_told():
    prior, likelihood, times = setting()
    labels = {"y": torch.ones(50, dtype=torch.long)}
    with pytest.raises(ValueError, match="above the bound -5"):
        Rejection(bound=-5.0)(prior, Reward({"y": likelihood}), labels, None, times, torch.Generator())
    with pytest.raises(ValueError, match="not accepted in 2 tries"):
        Rejection(tries=2)(prior, Reward({"y": likelihood}, 20.0), labels, None, times, torch.Generator())
