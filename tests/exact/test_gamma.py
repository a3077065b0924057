"""One control for several γ, where every target is known."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.evaluate.certificate import Slope, log_z
from ctrl_diffusion.exact.races import certificate_of, learn
from ctrl_diffusion.exact.task import SCHEDULES, Answers, Task, new_policy
from ctrl_diffusion.reward.reward import prior_table

GAMMAS = (0.5, 1.0, 2.0, 4.0)


def task_at(gamma, schedule="flow", steps=10):
    return Task(schedule, "logistic", gamma, steps=steps, gammas=tuple(g for g in GAMMAS if g != gamma))


@cache
def answers_of(task):
    return Answers(task, spacing=1.2)


@cache
def trained():
    return learn("weighted", task_at(1.0), effort=0.1)


def mean_gap(policy, task):
    answers, pairs = answers_of(task), range(task.conditions.pairs)
    return sum(answers.gap(answers.outcome(policy, pair), pair) for pair in pairs) / len(pairs)


def prior_tables(task, n, seed=0):
    """Rewards of prior samples of a task."""
    cond = task.conditions.cond_of(torch.arange(2).repeat_interleave(n))
    generator = torch.Generator().manual_seed(seed)
    x_0 = paths(task.prior(), 2 * n, task.times, generator, cond, batch=n).x_0
    return prior_table(task.reward(), task.conditions, x_0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_few_updates_bring_it_near_every_target(gamma):
    """Nearer than the prior is, and than the same control called at another γ."""
    task = task_at(gamma)
    gap, untrained = mean_gap(trained(), task), mean_gap(new_policy(task), task)
    assert gap < 0.35 * untrained
    answers = answers_of(task)
    wrong = replace(task, gamma=0.5 if gamma > 1 else 4.0)
    elsewhere = Answers(wrong, spacing=1.2)
    elsewhere.rewards, elsewhere.chains = answers.rewards, answers.chains  # called at another γ, for this reward
    pairs = range(task.conditions.pairs)
    assert gap < sum(elsewhere.gap(elsewhere.outcome(trained(), p), p) for p in pairs) / len(pairs)


def test_at_one_it_is_about_as_near_as_a_control_of_one_gamma():
    single = replace(task_at(1.0), gammas=())
    assert mean_gap(trained(), task_at(1.0)) < 1.5 * mean_gap(learn("weighted", single, effort=0.1), single)


@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_the_sampled_certificate_is_the_lattices_at_its_gamma(gamma):
    task = task_at(gamma)
    certificate = certificate_of(task, trained(), n=4000)
    assert certificate.gap == pytest.approx(mean_gap(trained(), task), abs=4 * certificate.stderr + 1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_log_z_rises_along_gamma_by_the_mean_of_log_p(schedule, gamma):
    """On lattices to the finite differences' error; from samples of the prior within theirs."""
    task, step = task_at(gamma, schedule), 1e-3
    answers, exact = answers_of(task), []
    for pair in range(task.conditions.pairs):
        chain, reward = answers.of(pair)
        log_p = reward / gamma
        mean = float(chain.log_target(reward).exp() @ log_p)
        slope = (chain.log_z((gamma + step) * log_p) - chain.log_z((gamma - step) * log_p)) / (2 * step)
        assert slope == pytest.approx(mean, abs=1e-6)
        exact.append(mean)
    table = prior_tables(task, 4000)
    slope = Slope.at(gamma, table, torch.zeros(2 * task.conditions.pairs))
    assert slope.log_z == pytest.approx(sum(exact) / len(exact), abs=4 * slope.log_z_stderr)
    assert 0 < slope.log_z_stderr < 0.05


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_the_slope_is_that_of_the_estimated_log_z(gamma):
    table, step = prior_tables(task_at(1.0), 500), 1e-3
    ends = [float(log_z(((gamma + by) * table).double())[0].mean()) for by in (-step, step)]
    slope = Slope.at(gamma, gamma * table, torch.zeros(2 * table.shape[0] * table.shape[2]))
    assert slope.log_z == pytest.approx((ends[1] - ends[0]) / (2 * step), abs=1e-5)


def test_the_error_of_the_slope_is_its_spread():
    slopes = [Slope.at(2.0, prior_tables(task_at(2.0), 300, seed), torch.zeros(8)) for seed in range(60)]
    spread = float(torch.tensor([slope.log_z for slope in slopes]).std())
    claimed = sum(slope.log_z_stderr for slope in slopes) / len(slopes)
    assert claimed == pytest.approx(spread, rel=0.3)


def test_the_mean_over_paths_is_of_log_p_at_gamma():
    rewards = 4.0 * torch.tensor([[-1.0, -3.0], [0.0, -2.0], [-1.0, -1.0], [-2.0, -2.0]])
    slope = Slope.at(4.0, torch.zeros(2, 5, 2), rewards.flatten())
    assert slope.log_p == pytest.approx(-1.5)
    assert slope.log_p_stderr == pytest.approx((1 + 1) ** 0.5 / 4)
