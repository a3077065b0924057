import math

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture, LinearGaussian, Logistic, posterior

DOUBLE = torch.float64
MEANS = torch.tensor([[-1.0, 0.2], [0.8, 0.5], [0.1, -0.9]], dtype=DOUBLE)
WEIGHTS = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.0, 0.4]], dtype=DOUBLE)
TURN = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))[0]
KINDS = {
    "isotropic": {"std": 0.4},
    "two conditions": {"std": 0.4, "weights": WEIGHTS},
    "one covariance": {"std": torch.tensor([0.5, 0.2], dtype=DOUBLE), "axes": TURN},
}


def mixture(kind, schedule):
    prior = GaussianMixture(MEANS, schedule=schedule, **KINDS[kind])
    return prior, torch.ones(5, dtype=torch.long) if kind == "two conditions" else None


def lattice(half=6.0, n=601):
    axis = torch.linspace(-half, half, n, dtype=DOUBLE)
    return torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_is_tweedies_formula_on_the_density(kind, schedule):
    """α E[x_0 | x_t] = x_t + σ² ∇ log p_t(x_t): the gradient by autograd of a density written on its own."""
    prior, c = mixture(kind, schedule)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).requires_grad_()
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = schedule(t)
        (score,) = torch.autograd.grad(prior.log_density(x, t, c).sum(), x)
        torch.testing.assert_close(prior(x, t, c=c), (x + sigma**2 * score) / alpha)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_one_and_the_samples_are_its(kind):
    prior, c = mixture(kind, Cosine())
    points, cell = lattice(n=301)
    everywhere = None if c is None else torch.ones(len(points), dtype=torch.long)
    density = prior.log_density(points, 0.0, everywhere).exp()
    assert float(density.sum() * cell) == pytest.approx(1.0, abs=1e-9)  # a trapezoid sum of Gaussians
    n = 200_000
    x = prior.sample(n, torch.Generator().manual_seed(0), None if c is None else torch.ones(n, dtype=torch.long))
    mean = (density[:, None] * points).sum(0) * cell
    second = torch.einsum("p,pi,pj->ij", density, points, points) * cell
    # five standard errors of a mean of variables below 1.2 and 2 in spread
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=5 * 1.2 / n**0.5)
    torch.testing.assert_close(x.T @ x / n, second, rtol=0, atol=5 * 2 / n**0.5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_is_the_tilt_by_quadrature(kind, gamma):
    prior, _ = mixture(kind, Cosine())
    likelihood = LinearGaussian(torch.tensor([0.6, -0.8], dtype=DOUBLE), torch.tensor([-0.5, 0.7], dtype=DOUBLE), 0.3)
    points, cell = lattice()
    for k in (0, 1):
        tilted, log_z = posterior(prior, likelihood, k, gamma)
        for g, expected in enumerate(log_z.view(-1)):
            c = torch.full((len(points),), g) if prior.weights.ndim == 2 else None
            joint = prior.log_density(points, 0.0, c) + gamma * likelihood.log_prob(points)[:, k]
            torch.testing.assert_close((joint.exp().sum() * cell).log(), expected)
            here = (joint - expected).exp()
            torch.testing.assert_close(tilted.log_density(points, 0.0, c).exp(), here, rtol=1e-6, atol=1e-9)


def test_a_posterior_of_the_flat_tilt_is_refused():
    prior, _ = mixture("isotropic", Cosine())
    with pytest.raises(ValueError, match="gamma must be positive"):
        posterior(prior, LinearGaussian(MEANS[0], MEANS[:, 0], 0.3), 0, 0.0)


def test_a_condition_that_is_missing_is_named():
    prior, _ = mixture("two conditions", Cosine())
    with pytest.raises(ValueError, match="2 conditions"):
        prior(MEANS, 0.5)


def test_likelihoods_are_distributions_over_y():
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    for likelihood in (
        ComponentLabel(GaussianMixture(MEANS, 0.4, Cosine())),
        Logistic(torch.tensor([0.6, 0.8], dtype=DOUBLE), 0.2),
    ):
        torch.testing.assert_close(likelihood.log_prob(x).logsumexp(1), torch.zeros(7, dtype=DOUBLE))
        assert likelihood.log_prob(x).shape == (7, likelihood.classes)
    border = torch.tensor([[0.2 * 0.6, 0.2 * 0.8]], dtype=DOUBLE)
    half = torch.full((1, 2), -math.log(2), dtype=DOUBLE)
    torch.testing.assert_close(Logistic(torch.tensor([0.6, 0.8], dtype=DOUBLE), 0.2).log_prob(border), half)
    values = torch.linspace(-12, 12, 2401, dtype=DOUBLE)
    density = LinearGaussian(torch.tensor([0.6, 0.8], dtype=DOUBLE), values, 0.3).log_prob(x).exp()
    torch.testing.assert_close(density.sum(1) * 0.01, torch.ones(7, dtype=DOUBLE))
