import math

import pytest
import torch

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.chain.transition import Gaussian
from ctrl_diffusion.exact.lattice import Lattice, LatticeChain, Tabulated
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture, LinearGaussian, posterior

DOUBLE = torch.float64
RADIUS, SPREAD = 1.33, 0.4
SCHEDULES = [Cosine(), RectifiedFlow()]


def normal(dim, schedule, spread=0.8):
    return GaussianMixture(torch.zeros(1, dim, dtype=DOUBLE), spread, schedule)


def slopes(chain):
    """Of mean(x) = slope · x for each step, and of the read-out: the chain of a normal prior is linear."""
    one = torch.ones(1, *chain.prior.shape, dtype=DOUBLE)
    means = []
    for lattice, step in zip(chain.lattices[:-1], chain.prior_steps, strict=True):
        means.append(float(step.mean[-1, 0] / lattice.points[-1, 0]))
    return means, float(chain.prior(one, chain.times[-1])[0, 0])


def test_a_step_on_a_lattice_keeps_mass_mean_and_variance():
    lattice = Lattice(5.0, 0.2, 2)
    step = Gaussian(torch.tensor([[0.33, -1.27], [0.0, 0.5]], dtype=DOUBLE), torch.tensor(0.3, dtype=DOUBLE))
    kernels = lattice.kernels(step)
    torch.testing.assert_close(lattice.expect(kernels, lattice.points[:, 0]), step.mean[:, 0])
    second = lattice.points.square().sum(1)
    torch.testing.assert_close(lattice.expect(kernels, second), step.mean.square().sum(1) + 2 * 0.09)
    mass, f = torch.tensor([0.3, 0.7], dtype=DOUBLE), torch.randn(len(lattice.points), dtype=DOUBLE)
    pushed = lattice.push(kernels, mass)
    assert float(pushed.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(pushed @ f, mass @ lattice.expect(kernels, f))  # push and expect are adjoint


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_linear_reward_has_log_z_and_best_policy_in_closed_form(schedule, dim):
    """r = b·x_0: the tilt of each step is a shift, so that the floor is the start's share alone, ½‖b_0‖²."""
    chain = LatticeChain(normal(dim, schedule), schedule.times(12, 0.1), radius=0.0, spread=0.8)
    means, read_out = slopes(chain)
    b = torch.tensor([0.9, -0.6][:dim], dtype=DOUBLE)
    reward, size = chain.x_0 @ b, float(b.square().sum())
    slope, objective = read_out, 0.0
    for mean, step in zip(reversed(means), reversed(chain.prior_steps), strict=True):
        objective += 0.5 * size * (slope * float(step.std)) ** 2
        slope *= mean
    best = chain.best(reward)
    found = chain.outcome(best, reward)
    # the lattice ends five deviations out: 1e-6 of a normal's mass times what the reward says there
    assert found.objective == pytest.approx(objective, abs=2e-5)
    assert chain.log_z(reward) == pytest.approx(objective + 0.5 * size * slope**2, abs=2e-5)
    assert -1e-9 < found.true_kl <= chain.log_z(reward) - found.objective + 2e-5


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_best_policy_for_a_quadratic_reward_is_the_recursion(schedule, dim):
    """V_i(x) = −½ κ_i ‖x‖² + const with m = mean_pre/(1 + κ std²): the linear-quadratic regulator."""
    chain = LatticeChain(normal(dim, schedule), schedule.times(12, 0.1), radius=0.0, spread=0.8)
    means, read_out = slopes(chain)
    reward = -1.5 * chain.x_0.square().sum(1)
    kappa, constant = 3.0 * read_out**2, 0.0
    for mean, step in zip(reversed(means), reversed(chain.prior_steps), strict=True):
        variance = float(step.std) ** 2
        constant -= 0.5 * dim * kappa * variance
        kappa *= mean**2 / (1 + kappa * variance)
    expected = constant - 0.5 * dim * kappa  # x_1 is standard normal
    found = chain.outcome(chain.best(reward), reward)
    assert found.objective == pytest.approx(expected, abs=2e-5)
    assert found.objective <= expected + 2e-5  # nothing beats the best
    assert chain.log_z(reward) > found.objective


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_policy_is_better_than_the_best(schedule):
    """A value with two peaks and a slope, step by step: 4,001 means tried for every state find nothing better."""
    prior = GaussianMixture(torch.tensor([[-1.2], [0.9]], dtype=DOUBLE), SPREAD, schedule)
    chain = LatticeChain(prior, schedule.times(8, 0.1), RADIUS, SPREAD)
    value = 3 * torch.cos(4 * chain.x_0[:, 0]) + chain.x_0[:, 0]
    for lattice, pre, found in zip(
        chain.lattices[:0:-1], chain.prior_steps[::-1], chain.best(value)[::-1], strict=True
    ):
        tried = torch.linspace(-6, 6, 4001, dtype=DOUBLE)
        smooth = lattice.expect(lattice.kernels(Gaussian(tried[:, None], pre.std)), value)
        best = (smooth - (tried - pre.mean).square() / (2 * pre.std**2)).max(1).values
        value = lattice.expect(lattice.kernels(found), value) - found.kl(pre)
        # between two of the means tried a quadratic of curvature 1/std² hides half of (0.0015/std)²; between the
        # peaks, where both are equally good, the branch of the neighbouring lattice point may be taken
        near = (best - value).abs() < 0.5 * (0.0015 / float(pre.std)) ** 2 + 1e-3
        assert near.double().mean() > 0.9
        assert float((best - value).max()) < 0.1


def ring(schedule):
    angle = torch.arange(8, dtype=DOUBLE) * (math.pi / 4)
    return GaussianMixture(RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1), SPREAD, schedule)


def test_the_label_of_equal_components_has_the_log_of_their_share():
    prior = ring(RectifiedFlow())
    chain = LatticeChain(prior, prior.times(25, 0.1), RADIUS, SPREAD)
    reward = ComponentLabel(prior).log_prob(chain.x_0)[:, 3]
    assert chain.log_z(reward) == pytest.approx(-math.log(8), abs=1e-5)  # by symmetry, whatever the steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tabulated_policy_does_to_samples_what_it_does_to_the_lattice(schedule):
    prior, n = ring(schedule), 20_000
    likelihood = LinearGaussian(torch.tensor([0.6, 0.8], dtype=DOUBLE), torch.tensor([0.8], dtype=DOUBLE), 0.3)
    chain = LatticeChain(prior, prior.times(10, 0.1), RADIUS, SPREAD)
    reward = likelihood.log_prob(chain.x_0)[:, 0]
    steps = chain.best(reward)
    found = chain.outcome(steps, reward)
    x_0, kl, log_ratio = paths(Tabulated(chain, steps), n, chain.times, torch.Generator().manual_seed(0), compare=True)
    log_w = likelihood.log_prob(x_0.double())[:, 0] - log_ratio
    # five standard errors, and what linear interpolation between points 0.7 std apart does: some thousandths of a nat
    assert float(log_w.mean()) == pytest.approx(found.objective, abs=5 * float(log_w.std()) / n**0.5 + 5e-3)
    assert float(kl.mean()) == pytest.approx(float(found.kl_steps.sum()), abs=5 * float(kl.std()) / n**0.5 + 5e-3)
    # any policy's weights average to Z: five standard errors of a log-mean-exp, by the delta method
    error = float(((log_w.softmax(0) * n).var() / n).sqrt())
    assert float(log_w.logsumexp(0)) - math.log(n) == pytest.approx(chain.log_z(reward), abs=5 * error)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_exact_conditional_denoiser_costs_a_gap_that_halves_with_the_steps(schedule):
    prior = GaussianMixture(torch.tensor([[-1.2], [0.2], [1.3]], dtype=DOUBLE), 0.4, schedule)
    likelihood = LinearGaussian(torch.ones(1, dtype=DOUBLE), torch.tensor([0.8], dtype=DOUBLE), 0.3)
    exact, log_z = posterior(prior, likelihood, 0)
    gaps, floors, errors = [], [], []
    for steps in (100, 200):
        chain = LatticeChain(prior, prior.times(steps, 0.03, power=2.0), RADIUS, SPREAD)
        reward = likelihood.log_prob(chain.x_0)[:, 0]
        gaps.append(chain.log_z(reward) - chain.outcome(list(chain.steps(exact)), reward).objective)
        floors.append(chain.log_z(reward) - chain.outcome(chain.best(reward), reward).objective)
        errors.append(abs(chain.log_z(reward) - float(log_z)))
    # first order in the step: a half, with what the second order leaves
    assert gaps[1] == pytest.approx(gaps[0] / 2, rel=0.1)
    assert floors[1] == pytest.approx(floors[0] / 2, rel=0.1)
    assert floors[0] < gaps[0]
    assert floors[1] < gaps[1]
    assert errors[1] < 0.01, "the chain comes to the clean mixture"


def test_the_target_is_sampled():
    prior = ring(Cosine())
    chain = LatticeChain(prior, prior.times(10, 0.1), RADIUS, SPREAD)
    reward = 2.0 * chain.x_0[:, 0]
    x, target = chain.sample_target(reward, 100_000, torch.Generator().manual_seed(0)), chain.log_target(reward).exp()
    mean = target @ chain.lattices[-1].points
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=5 * 1.0 / 100_000**0.5)  # spread below 1


def test_three_dimensions_and_a_chain_without_noise_are_refused():
    with pytest.raises(ValueError, match="1 or 2 dimensions, got 3"):
        LatticeChain(normal(3, Cosine()), Cosine().times(5, 0.1), 0.0, 0.8)
    with pytest.raises(ValueError, match="eta = 0"):
        LatticeChain(normal(1, Cosine()), Cosine().times(5, 0.1), 0.0, 0.8, eta=0.0)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_a_reward_what_is_plugged_in_is_the_prior(schedule, dim):
    """E[E[x_0 | x_N] | x_t] = E[x_0 | x_t], by sums over the last lattice instead of the closed form."""
    prior = GaussianMixture(torch.tensor([[-1.0, 0.2], [0.8, 0.5]], dtype=DOUBLE)[:, :dim], SPREAD, schedule)
    chain = LatticeChain(prior, schedule.times(8, 0.1), RADIUS, SPREAD, spacing=1.0)
    log_p = prior.log_density(chain.lattices[-1].points, chain.times[-1])
    for found, pre, lattice in zip(chain.plugged_in(log_p), chain.prior_steps, chain.lattices, strict=False):
        near = lattice.points.abs().amax(1) < 2.0  # further out x_0 lies beyond the last lattice
        torch.testing.assert_close(found.mean[near], pre.mean[near], atol=2e-4, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_plugged_in_comes_to_the_posteriors_denoiser(schedule):
    """The reward is asked at the read-out, x_0 up to the last noise: they differ by the order of its square."""
    means, weights = torch.tensor([[-1.0, 0.4], [0.9, 0.8]], dtype=DOUBLE), torch.tensor([0.3, 0.7], dtype=DOUBLE)
    prior = GaussianMixture(means, SPREAD, schedule, weights)
    values = torch.tensor([0.5], dtype=DOUBLE)
    likelihood, missed = LinearGaussian(torch.tensor([0.8, 0.6], dtype=DOUBLE), values, 0.5), []
    exact, _ = posterior(prior, likelihood, 0)
    for sigma_end in (0.2, 0.1):
        chain = LatticeChain(prior, schedule.times(6, sigma_end), RADIUS, SPREAD, spacing=1.0)
        reward = likelihood.log_prob(chain.x_0)[:, 0]
        log_p = prior.log_density(chain.lattices[-1].points, chain.times[-1])
        found, other = chain.plugged_in(log_p + reward)[2], list(chain.steps(exact))[2]
        near = chain.lattices[2].points.abs().amax(1) < 2.0
        missed.append(float((found.mean - other.mean)[near].abs().mean()))
    assert missed[1] < 0.4 * missed[0]  # 0.25, at times that are not quite the same
    assert missed[1] < 0.01


def test_a_coarser_lattice_says_the_same():
    schedule = RectifiedFlow()
    prior, found = normal(2, schedule), []
    for spacing in (0.7, 1.2):
        chain = LatticeChain(prior, schedule.times(6, 0.1), radius=0.0, spread=0.8, spacing=spacing)
        reward = chain.x_0 @ torch.tensor([0.9, -0.6], dtype=DOUBLE)
        found.append(chain.log_z(reward))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
