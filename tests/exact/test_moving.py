"""A mixture that moves with a continuous c, against autograd, quadrature and the mixture at rest."""

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture, LinearGaussian
from ctrl_diffusion.exact.moving import MovingMixture, moving_log_z, moving_posterior

DOUBLE = torch.float64
MEANS = torch.tensor([[-1.0, 0.2], [0.8, 0.5], [0.1, -0.9]], dtype=DOUBLE)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
MOVE = torch.tensor([[0.5, -0.3], [0.2, 0.7]], dtype=DOUBLE)
LEAN = torch.tensor([[0.6, 0.0], [-0.4, 0.9], [0.2, -0.5]], dtype=DOUBLE)
TURN = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))[0]
KINDS = {"isotropic": {"std": 0.4}, "one covariance": {"std": torch.tensor([0.5, 0.2], dtype=DOUBLE), "axes": TURN}}
PLACES = torch.tensor([[0.0, 0.0], [1.2, -0.7], [-0.4, 2.1]], dtype=DOUBLE)  # c
LIKELIHOOD = LinearGaussian(torch.tensor([0.6, -0.8], dtype=DOUBLE), torch.tensor([-0.5, 0.7], dtype=DOUBLE), 0.3)


def mixture(kind, schedule=RectifiedFlow(), move=MOVE, lean=LEAN):  # noqa: B008
    return MovingMixture(MEANS, schedule=schedule, move=move, lean=lean, weights=WEIGHTS, **KINDS[kind])


def lattice(half=6.0, n=241):
    axis = torch.linspace(-half, half, n, dtype=DOUBLE)
    return torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_is_tweedies_formula_on_the_density(kind, schedule):
    """α E[x_0 | x_t, c] = x_t + σ² ∇ log p_t(x_t | c), each row under a c and at a time of its own."""
    prior = mixture(kind, schedule)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).requires_grad_()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE)
    alpha, sigma = (a[:, None] for a in schedule(t))
    (score,) = torch.autograd.grad(prior.log_density(x, t, PLACES).sum(), x)
    torch.testing.assert_close(prior(x, t, c=PLACES), (x + sigma**2 * score) / alpha)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_that_neither_moves_nor_leans_is_the_one_at_rest(kind):
    still = mixture(kind, move=torch.zeros(2, 2, dtype=DOUBLE), lean=torch.zeros(3, 2, dtype=DOUBLE))
    at_rest = GaussianMixture(MEANS, schedule=RectifiedFlow(), weights=WEIGHTS, **KINDS[kind])
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    torch.testing.assert_close(still(x, 0.4, c=PLACES), at_rest(x, 0.4))
    torch.testing.assert_close(still.log_density(x, 0.4, PLACES), at_rest.log_density(x, 0.4))
    samples = [p.sample(3, torch.Generator().manual_seed(2), c) for p, c in ((still, PLACES), (at_rest, None))]
    torch.testing.assert_close(*samples)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_one_and_the_samples_are_its(kind):
    prior, (points, cell), n = mixture(kind), lattice(), 100_000
    for c in PLACES:
        density = prior.log_density(points, 0.0, c.expand(len(points), -1)).exp()
        assert float(density.sum() * cell) == pytest.approx(1.0, abs=1e-9)  # a trapezoid sum of Gaussians
        x = prior.sample(n, torch.Generator().manual_seed(0), c.expand(n, -1))
        for power in (1, 2):
            expected = (density[:, None] * points**power).sum(0) * cell
            variance = (density[:, None] * points ** (2 * power)).sum(0) * cell - expected**2
            # five standard errors of a mean
            assert bool(((x**power).mean(0) - expected).abs().lt(5 * (variance / n).sqrt()).all())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_of_every_c_is_the_tilt_by_quadrature(kind, gamma):
    prior, (points, cell) = mixture(kind), lattice()
    log_z = moving_log_z(prior, LIKELIHOOD, PLACES, gamma)
    for k in (0, 1):
        tilted = moving_posterior(prior, LIKELIHOOD, k, gamma)
        for c, expected in zip(PLACES, log_z[:, k], strict=True):
            rows = c.expand(len(points), -1)
            joint = prior.log_density(points, 0.0, rows) + gamma * LIKELIHOOD.log_prob(points)[:, k]
            torch.testing.assert_close((joint.exp().sum() * cell).log(), expected)
            here = (joint - expected).exp()
            torch.testing.assert_close(tilted.log_density(points, 0.0, rows).exp(), here, rtol=1e-6, atol=1e-9)


def test_a_component_is_known_by_its_c():
    """By Bayes' rule on the densities of each component; under another c the same x is another component's."""
    prior = mixture("isotropic")
    label = ComponentLabel(prior, conditional=True)
    x = torch.zeros(3, 2, dtype=DOUBLE)
    log_p = label.log_prob(x, c=PLACES)
    joint = [
        (prior.log_weights(PLACES, 3)[:, k].exp())
        * torch.distributions.Normal(MEANS[k] + PLACES @ MOVE.mT, 0.4).log_prob(x).sum(1).exp()
        for k in range(3)
    ]
    expected = torch.stack(joint, dim=1)
    torch.testing.assert_close(log_p.exp(), expected / expected.sum(1, keepdim=True))
    assert len(log_p.argmax(1).unique()) > 1


@pytest.mark.parametrize("c", [None, torch.zeros(3, dtype=torch.long), torch.zeros(3, 1)])
def test_a_condition_that_is_no_point_is_refused(c):
    with pytest.raises(ValueError, match=r"continuous condition: give c \(B, 2\)"):
        mixture("isotropic")(torch.zeros(3, 2, dtype=DOUBLE), 0.5, c=c)
