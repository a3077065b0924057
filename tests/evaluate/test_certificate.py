import math
import warnings

import pytest
import torch

from ctrl_diffusion.chain.denoise import Denoiser
from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.chain.transition import step_std, transition
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.data.labels import Labels
from ctrl_diffusion.evaluate.certificate import certify, gamma_within, log_mean_exp, log_z, tilt_kl
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.reward.reward import hits

N = 4000


class TiltedGaussian(Denoiser):
    """The best policy for a linear reward b·x_0 on a normal prior: the control is the (constant) adjoint.

    The chain is linear, x_s = ρ x_t + std z, so a_i = a_{i+1} ρ_i and u_i = std_i a_{i+1}.
    """

    def __init__(self, prior, times, b):
        super().__init__()
        self.base, self.schedule, self.shape, self.times = prior, prior.schedule, prior.shape, times
        origin, unit = torch.zeros(1, 1), torch.ones(1, 1)
        a = b * float(prior(unit, times[-1]) - prior(origin, times[-1]))
        self.shift, self.step_variance, self.adjoints = {}, {}, [a]
        for t, s in reversed(list(zip(times[:-1], times[1:], strict=True))):
            rho = float(transition(prior, unit, t, s).mean - transition(prior, origin, t, s).mean)
            per_x_hat = float(transition(Shifted(prior, 1.0), origin, t, s).mean - transition(prior, origin, t, s).mean)
            self.shift[t] = float(step_std(prior.schedule, t, s)) ** 2 * a / per_x_hat
            a *= rho
            self.adjoints.insert(0, a)

    @property
    def prior(self):
        return self.base

    def forward(self, x_t, t, labels: Labels | None = None, strength: float = 1.0):
        return self.base(x_t, t) + strength * self.shift[t]


class Shifted(Denoiser):
    def __init__(self, prior, by):
        super().__init__()
        self.base, self.by, self.schedule, self.shape = prior, by, prior.schedule, prior.shape

    def forward(self, x_t, t):
        return self.base(x_t, t) + self.by


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_linear_reward_has_every_figure_in_closed_form(schedule, strength):
    b, times = 1.5, schedule.times(10, 0.1)
    prior = GaussianMixture(torch.zeros(1, 1), 1.0, schedule)
    policy = TiltedGaussian(prior, times, b)
    x_prior = paths(prior, N, times, torch.Generator().manual_seed(0)).x_0
    labels = {"y": torch.zeros(N, dtype=torch.long)}
    x_0, kl, log_ratio = paths(
        policy, N, times, torch.Generator().manual_seed(1), labels=labels, strength=strength, compare=True
    )
    found = certify(Conditions({}, {"y": 1}), (b * x_prior).view(1, N, 1), b * x_0.squeeze(1), kl, log_ratio)

    stds = [float(step_std(schedule, t, s)) for t, s in zip(times[:-1], times[1:], strict=True)]
    steps = sum((std * a) ** 2 for std, a in zip(stds, policy.adjoints[1:], strict=True))
    true_log_z = 0.5 * (policy.adjoints[0] ** 2 + steps)
    true_kl = 0.5 * strength**2 * steps
    true_objective = strength * steps - true_kl
    # estimates of a mean from N samples: five standard errors, from the known variances
    assert found.kl == pytest.approx(true_kl, rel=1e-4, abs=1e-6)
    spread = math.sqrt(policy.adjoints[0] ** 2 + (1 - strength) ** 2 * steps)
    assert abs(found.objective - true_objective) < 5 * spread / math.sqrt(N) + 1e-5
    assert abs(found.log_z - true_log_z) < 5 * math.sqrt((math.exp(2 * true_log_z) - 1) / N)
    # a fixed start costs log Z − E log Z(x_1) = ½ a_0²; the rest is the control that was left out
    true_gap = 0.5 * policy.adjoints[0] ** 2 + 0.5 * (1 - strength) ** 2 * steps
    assert abs(found.gap - true_gap) < 5 * found.stderr
    # log w is normal with known spread: so are the errors and, up to 5 of its own errors, the check of log Z
    assert found.objective_stderr == pytest.approx(spread / math.sqrt(N), rel=0.1, abs=1e-6)
    assert found.stderr == pytest.approx(math.hypot(found.objective_stderr, found.log_z_stderr))
    # of a single pair the second-order term, a share V/2 < 0.1 % of log Z's variance, is taken off the mean's alone
    assert found.pairs.stderr.item() == pytest.approx(found.stderr, rel=1e-3)
    assert found.log_z_policy - true_log_z < 5 * math.sqrt((math.exp(spread**2) - 1) / N) + 1e-5


def test_the_standard_error_is_the_spread_over_repetitions():
    """Delta method against brute force: 400 repetitions of an estimate from 500 samples of 2 × 3 pairs."""
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(400, 2, 500, 3, generator=generator) * torch.tensor([0.5, 1.0, 1.5])
    estimates, errors = zip(*(log_z(table) for table in tables), strict=True)
    spread = float(torch.stack(estimates).mean(1).std())
    # the spread of 400 repetitions is known to 1/√800 = 3.5 %: three of these
    assert sum(errors) / 400 == pytest.approx(spread, rel=0.11)


def test_both_log_z_have_the_errors_a_bootstrap_finds():
    """Delta method against 400 resamplings of the same samples, per pair, for prior and policy."""
    generator, n = torch.Generator().manual_seed(0), 2000
    s, s_policy = torch.tensor([0.5, 1.2]), torch.tensor([[0.3], [0.6], [0.9], [1.2]])
    table = torch.randn(2, n, 2, generator=generator) * s - s**2 / 2  # log Z = 0
    log_w = torch.randn(4, n, generator=generator) * s_policy - s_policy**2 / 2
    found = certify(Conditions({"c": torch.arange(2)}, {"y": 2}), table, log_w.flatten(), torch.zeros(4 * n), 0.0)
    rows = {"log_z": table.transpose(1, 2).flatten(0, 1), "log_z_policy": log_w}
    for name, samples in rows.items():
        draws = torch.randint(n, (400, n), generator=generator)
        spread = torch.stack([samples[:, draw].logsumexp(1) for draw in draws]).std(0)
        # 400 resamplings know a spread to 3.5 %: four of these
        torch.testing.assert_close(getattr(found.pairs, f"{name}_stderr"), spread, rtol=0.14, atol=0)


@pytest.mark.parametrize("budget", [0.05, 0.5])
def test_a_budget_buys_the_gamma_whose_target_costs_as_much(budget):
    """A normal tilted by γ b x lies ½ γ² b² nats away."""
    x = torch.randn(1, 200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = Conditions({}, {"y": 1})
    gamma = gamma_within(one, 1.5 * x, budget, most=5.0)
    # the variance of 200,000 normals is known to 0.3 %, that of their tilt to some times that
    assert gamma == pytest.approx(math.sqrt(2 * budget) / 1.5, rel=0.02)
    assert tilt_kl(1.5 * x, gamma) == pytest.approx(budget, rel=1e-6)
    assert gamma_within(one, 1.5 * x, 1e6, most=0.7) == 0.7


def test_a_policy_that_misses_a_mode_is_warned_of():
    table = torch.zeros(1, 1000, 1)
    earned = torch.full((1000,), -2.0) + 0.01 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="misses modes"):
        certify(Conditions({}, {"y": 1}), table, earned, torch.zeros(1000), torch.zeros(1000))


@pytest.mark.parametrize(("kl", "members", "measured"), [(12.5, 1000, False), (12.5, 10_000, False), (0.3, 1000, True)])
def test_a_budget_beyond_what_samples_measure_is_said(kl, members, measured):
    """A normal tilted by b x lies ½ b² nats away; 1,000 samples see 6.9 at most, 3.5 with thirty that count."""
    x = torch.randn(1, members, 1, generator=torch.Generator().manual_seed(0))
    log_p = math.sqrt(2 * kl) * x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gamma_within(Conditions({}, {"tone": 1}, names={"tone": ["dark"]}), log_p - log_p.max(), 8.0, 1.0)
    lines = [str(each.message) for each in caught]
    assert len(lines) == (0 if measured else 1)
    assert measured or ("tone = dark" in lines[0] and f"{math.log(members / 30):.1f} nats at most" in lines[0])


def test_a_budget_for_a_y_that_no_sample_has_is_said():
    """The weights are even there, and its KL seems to be 0."""
    table = torch.full((1, 1000, 2), -14.0)
    table[..., 0] = -0.01
    with pytest.warns(RuntimeWarning, match="y = 1 and may lie far above 1"):
        gamma_within(Conditions({}, {"y": 2}), table, 1.0, 1.0)


@pytest.mark.parametrize(("gamma", "expected"), [(0.0, 4.0), (0.5, 1.3), (1.0, 1.3), (2.0, 0.87)])
def test_hits_count_samples_that_have_y_whatever_gamma(gamma, expected):
    """Σ p̂, and Σ p̂^γ where a few of the surest own the weights; γ = 0 has every sample."""
    log_p = torch.tensor([0.9, 0.2, 0.1, 0.1]).log().view(1, 4, 1)
    assert float(hits(gamma * log_p, gamma)) == pytest.approx(expected)


def test_a_density_counts_a_sample_once_at_most():
    assert float(hits(torch.tensor([1.6, 1.6, 0.8, 1e-6]).log().view(1, 4, 1))) == pytest.approx(2.5, abs=1e-5)


def test_hits_bound_the_variance_and_the_effective_number():
    """What the guard rests on: relative variance ≤ 1/hits, and as many effective samples at least."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.5, 3.0, 10.0):
        table = (scale * torch.randn(1, 2000, 5, generator=generator)).log_softmax(2)
        counts, u = hits(table), (table - log_mean_exp(table, 1)[:, None]).exp()
        assert (u.var(1, unbiased=False) / 2000 <= 1 / counts).all()
        assert (1 / table.softmax(1).square().sum(1) >= counts - 1e-3).all()


def test_a_policy_that_shows_more_of_log_z_than_the_prior_is_said():
    """p̂'s floor gives hits enough; the policy's paths have what no sample of the prior has."""
    generator = torch.Generator().manual_seed(0)
    table = torch.full((1, 2000, 2), -4.0)
    table[..., 1] = -0.02
    log_w = torch.stack([-2.0 + 0.1 * torch.randn(200, generator=generator), -0.02 + torch.zeros(200)])
    with pytest.warns(RuntimeWarning, match=r"above the prior's for 1 of 2 \(c, y\) \(y = 0\), by up to 2\.0"):
        found = certify(Conditions({}, {"y": 2}), table, log_w.flatten(), torch.zeros(400), torch.zeros(400))
    assert found.certified.tolist() == [False, True]
    assert found.on_paths.tolist() == [True, False]
    assert found.metrics()["on_paths"]["pairs"] == 1
    assert found.pairs.log_z[0] == pytest.approx(-2.0, abs=0.1), "the larger"


def test_a_floor_below_what_floats_hold_spoils_no_other_pair():
    table = torch.full((1, 100, 2), -1000.0)
    table[..., 1] = -0.02
    with pytest.warns(RuntimeWarning, match=r"for 1 of 2 \(c, y\)"):
        found = certify(Conditions({}, {"y": 2}), table, torch.full((20,), -0.02), torch.zeros(20), torch.zeros(20))
    assert found.certified.tolist() == [False, True]
    assert found.gap == pytest.approx(0.0, abs=1e-6)
    assert 0 < found.stderr <= 0.0103, "one over 98 hits"


@pytest.mark.parametrize("n", [2, 9])
def test_a_handful_of_paths_overrules_nothing(n):
    """However near to each other, they cannot say that the prior's log Z is low."""
    table, log_w = torch.full((1, 2000, 1), -4.0), torch.full((n,), -1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert certify(Conditions({}, {"y": 1}), table, log_w, torch.zeros(n), torch.zeros(n)).certified.all()


def test_where_nothing_is_certified_no_number_is_given():
    table, log_w = torch.full((1, 100, 2), -14.0), torch.full((20,), -14.0)
    with pytest.warns(RuntimeWarning, match=r"log Z is not certified for 2 of 2 \(c, y\)"):
        found = certify(Conditions({}, {"y": 2}), table, log_w, torch.zeros(20), torch.zeros(20))
    assert (found.gap, found.stderr, found.log_z, found.log_z_stderr) == (None,) * 4
    metrics = found.metrics()
    assert metrics["uncertified"] == ["y = 0", "y = 1"]
    assert (metrics["certified_pairs"], metrics["of_pairs"], metrics["on_paths"]) == (0, 2, None)
    assert metrics["pairs"]["gap_nats"] == metrics["pairs"]["rests_on"] == [None, None]
    assert metrics["objective_nats"] == pytest.approx(-14.0), "J is known"
