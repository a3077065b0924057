import math

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.exact.mixtures import GaussianMixture, LinearGaussian
from ctrl_diffusion.guide.reconstruction import DPS, MPGD
from ctrl_diffusion.reward.reward import Reward

DOUBLE = torch.float64


def normal(variance, schedule, dim=1, mean=0.0):
    return GaussianMixture(torch.full((1, dim), mean, dtype=DOUBLE), math.sqrt(variance), schedule)


def likelihood(dim=1):
    direction = torch.zeros(dim, dtype=DOUBLE)
    direction[0] = 1.0
    return LinearGaussian(direction, torch.tensor([2.0], dtype=DOUBLE), 0.5)


# By hand, for y = 2 of y = x_0 + noise of variance 1/4 at α = 0.8, σ = 0.6, x_t = 1 and a normal prior of variance v:
# v = 1: V = 0.64 + 0.36 = 1, x̂ = 0.8, Cov = 0.36, ∇r = (2 − 0.8)/0.25 = 4.8, shift 0.36 · 4.8 = 1.728
# v = 4: V = 2.92, x̂ = 3.2/2.92, Cov = 1.44/2.92, ∇r = 4 (2 − 3.2/2.92) = 10.56/2.92
HAND = {1.0: (0.8, 1.728), 4.0: (3.2 / 2.92, 1.44 * 10.56 / 2.92**2)}


@pytest.mark.parametrize("variance", HAND)
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("method", [DPS, MPGD])
def test_a_step_is_the_one_computed_by_hand(method, strength, variance):
    schedule = Cosine()
    t, s = (2 / math.pi * math.asin(sigma) for sigma in (0.6, 0.28))  # α is then 0.8 and 0.96
    guidance = MPGD(variance) if method is MPGD else DPS()
    guided = guidance.steered(normal(variance, schedule), Reward({"y": likelihood()}))
    x_t = torch.ones(1, 1, dtype=DOUBLE)
    x_hat, shift = HAND[variance]
    x_hat = x_hat + strength * shift
    found = transition(guided, x_t, t, s, labels={"y": torch.tensor([0])}, strength=strength)
    std = 0.28 / 0.6 * math.sqrt(0.36 - (0.8 / 0.96 * 0.28) ** 2)
    mean = 0.96 * x_hat + math.sqrt(0.28**2 - std**2) * (1 - 0.8 * x_hat) / 0.6
    assert float(found.std) == pytest.approx(std)  # the prior's
    assert float(found.mean) == pytest.approx(mean)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_on_a_normal_prior_both_are_one(schedule):
    """MPGD's c_t is the variance of x_0 given x_t, which is what DPS multiplies ∇r with: any γ, any two controls."""
    prior = normal(0.7, schedule, dim=3, mean=0.3)
    other = LinearGaussian(torch.tensor([0.3, -1.0, 0.2], dtype=DOUBLE), torch.tensor([0.0, 1.0], dtype=DOUBLE), 0.8)
    reward, labels = (
        Reward({"y": likelihood(3), "z": other}, 1.7),
        {"y": torch.zeros(5).long(), "z": torch.ones(5).long()},
    )
    x_t = torch.randn(5, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    for t in (0.9, 0.5, 0.1):
        found = [method.steered(prior, reward)(x_t, t, labels=labels, strength=1.3) for method in (DPS(), MPGD(0.7))]
        torch.testing.assert_close(*found)


def test_nothing_is_followed_at_pure_noise():
    """α = 0: x_1 knows nothing of y, and σ²/α times a gradient of zero is no number."""
    guided = DPS().steered(normal(1.0, RectifiedFlow()), Reward({"y": likelihood()}))
    x_1, labels = torch.ones(1, 1, dtype=DOUBLE), {"y": torch.tensor([0])}
    torch.testing.assert_close(guided(x_1, 1.0, labels=labels), guided(x_1, 1.0))
