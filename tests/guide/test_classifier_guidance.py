import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow, per_sample
from ctrl_diffusion.exact.lattice import LatticeChain
from ctrl_diffusion.exact.mixtures import GaussianMixture, LinearGaussian, Logistic, posterior
from ctrl_diffusion.guide.classifier_guidance import ClassifierGuidance
from ctrl_diffusion.reward.reward import Reward

DOUBLE = torch.float64
SCHEDULES = [Cosine(), RectifiedFlow()]


class Noised:
    """log p(y | x_t, c) of a linear-Gaussian y under a mixture.

    It is log Σ_k r_k(x_t, c) N(y; a·E_k[x_0 | x_t], aᵀ Cov[x_0 | x_t, k] a + τ²).
    """

    conditional = True

    def __init__(self, mixture, likelihood):
        self.mixture, self.likelihood = mixture, likelihood

    def log_prob(self, x_t, t, c=None):
        mixture, a = self.mixture, self.likelihood.direction
        alpha, sigma = (per_sample(value, x_t) for value in mixture.schedule(t))
        variance = (alpha * mixture.std) ** 2 + sigma**2
        means = mixture.means + alpha * mixture.std**2 / variance * (x_t[:, None] - alpha * mixture.means)  # (B, K, D)
        spread = (a.square() * (mixture.std * sigma) ** 2 / variance).sum() + self.likelihood.std**2
        of_y = torch.distributions.Normal((means @ a)[:, :, None], spread.sqrt()).log_prob(self.likelihood.values)
        r = mixture.log_components(x_t, t, c).log_softmax(1)
        return (r[:, :, None] + of_y).logsumexp(1)


def setting(schedule, dim):
    means = torch.tensor([[-1.0, 0.4], [0.9, 0.8], [0.3, -1.1]], dtype=DOUBLE)[:, :dim]
    weights = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=DOUBLE)
    prior = GaussianMixture(means, 0.4, schedule, weights)
    direction = torch.tensor([0.8, 0.6], dtype=DOUBLE)[:dim]
    return prior, LinearGaussian(direction, torch.tensor([-1.0, 0.5], dtype=DOUBLE), 0.5)


@pytest.mark.parametrize("t", [0.95, 0.5, 0.1])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_the_true_noisy_likelihood_it_is_the_posteriors_denoiser(schedule, t):
    """Tweedie: x̂ + (σ²/α) ∇ log p(y | x_t) = E[x_0 | x_t, y], known of a mixture."""
    prior, likelihood = setting(schedule, 2)
    guidance = ClassifierGuidance({"y": Noised(prior, likelihood)})
    guided = guidance.steered(prior, Reward({"y": likelihood}))
    x_t = 1.5 * torch.randn(20, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    c = torch.arange(20) % 2
    for k in range(2):
        exact, _ = posterior(prior, likelihood, k)
        torch.testing.assert_close(guided(x_t, t, labels={"y": torch.full((20,), k)}, c=c), exact(x_t, t, c=c))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pure_noise_is_not_guided(schedule):
    """A fitted classifier has some slope there too, which 1/α would blow up."""

    class Sloping:
        def log_prob(self, x_t, t):
            return Logistic(torch.tensor([0.1, 0.0], dtype=DOUBLE)).log_prob(x_t)

    prior, _ = setting(schedule, 2)
    guided = ClassifierGuidance({"y": Sloping()}).steered(prior, Reward({}))
    x_1, cond, labels = torch.ones(3, 2, dtype=DOUBLE), {"c": torch.tensor([0, 1, 1])}, {"y": torch.tensor([0, 1, 0])}
    torch.testing.assert_close(guided(x_1, 1.0, labels=labels, **cond), prior(x_1, 1.0, **cond), rtol=0, atol=0)
    assert (guided(x_1, 0.9, labels=labels, **cond) - prior(x_1, 0.9, **cond)).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_small_steps_come_to_the_target(schedule):
    """On a lattice, without samples.

    A step's mean is right but for the second order of its size, its variance but for the first relative to itself: of a
    path of N steps the KL is of order 1/N. Densities of the end are wrong by 1/N, and their KL, quadratic in that, by
    1/N².
    """
    prior, likelihood = setting(schedule, 1)
    guided = ClassifierGuidance({"y": Noised(prior, likelihood)}).steered(prior, Reward({"y": likelihood}))
    gaps, kls = [], []
    for steps in (20, 40, 80):
        cond = {"c": torch.tensor([1])}
        chain = LatticeChain(prior, schedule.times(steps, 0.05), radius=1.2, spread=0.4, cond=cond)
        reward = likelihood.log_prob(chain.x_0)[:, 1]
        found = chain.outcome(list(chain.steps(guided, y=torch.tensor([1]))), reward)
        gaps.append(chain.log_z(reward) - found.objective)
        kls.append(found.true_kl)
        plain = chain.outcome(chain.prior_steps, reward)
    for coarse, fine in zip(gaps, gaps[1:], strict=False):
        assert 0 < fine < 0.65 * coarse  # 0.5, and room for the next order
    for coarse, fine in zip(kls, kls[1:], strict=False):
        assert 0 < fine < 0.4 * coarse  # 0.25
    assert kls[-1] < 0.01 * plain.true_kl
