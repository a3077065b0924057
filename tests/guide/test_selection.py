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


def test_a_bound_that_is_none_and_tries_that_do_not_do_are_told():
    prior, likelihood, times = setting()
    labels = {"y": torch.ones(50, dtype=torch.long)}
    with pytest.raises(ValueError, match="above the bound -5"):
        Rejection(bound=-5.0)(prior, Reward({"y": likelihood}), labels, None, times, torch.Generator())
    with pytest.raises(ValueError, match="not accepted in 2 tries"):
        Rejection(tries=2)(prior, Reward({"y": likelihood}, 20.0), labels, None, times, torch.Generator())
