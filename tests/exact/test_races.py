import json
from functools import cache
from itertools import pairwise

import pytest
import torch

from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.evaluate.certificate import log_mean_exp
from ctrl_diffusion.evaluate.resample import exact_samples
from ctrl_diffusion.exact.lattice import Tabulated
from ctrl_diffusion.exact.races import ENTRIES, end_states, energy_test, learn, programme, race
from ctrl_diffusion.exact.task import SCHEDULES, Answers, Task
from ctrl_diffusion.reward.reward import prior_table

# the same law on both, of which one is learned on by default: training takes the time
FLOW_FIRST = ["flow", pytest.param("vp", marks=pytest.mark.slow)]

# the bars of each learner above its floor, in nats, at γ = 1 and 2
BARS = {
    "adjoint": (0.05, 0.10),
    "backprop": (0.05, 0.10),
    "ppo": (0.12, 0.25),
    "weighted": (0.12, 0.25),
    "contrast": (0.12, 0.25),
}


@cache
def answers_of(task):
    return Answers(task)


@pytest.mark.parametrize("likelihood", ["logistic", "two controls", "linear-Gaussian", "component"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_lattice_and_samples_agree_on_log_z(schedule, likelihood):
    task = Task(schedule, likelihood, steps=10)
    answers, n = Answers(task), 20_000
    for g in range(2):
        chain, _ = answers.of(g * task.conditions.classes)
        ends = end_states(task, task.prior(), g * task.conditions.classes, n, torch.Generator().manual_seed(g))
        x_0 = task.prior()(ends, task.times[-1], c=torch.full((n,), g))
        table = prior_table(task.reward(), replace_conditions(task, g), x_0)[0]
        found = log_mean_exp(table, 0)
        error = ((table.softmax(0) * n).var(0) / n).sqrt()  # of a log-mean-exp, by the delta method
        for y in range(task.conditions.classes):
            assert chain.log_z(answers.of(g * task.conditions.classes + y)[1]) == pytest.approx(
                float(found[y]), abs=5 * float(error[y]) + 1e-4
            )


def replace_conditions(task, g):
    conditions = task.conditions
    return type(conditions)({"c": torch.tensor([g])}, conditions.controls)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_best_gaussian_steps_sample_the_target_and_the_prior_does_not(schedule):
    task = Task(schedule, "logistic", steps=50)
    answers, pair = Answers(task), task.conditions.pairs - 1
    chain, reward = answers.of(pair)
    best, plain = Tabulated(chain, chain.best(reward)), Tabulated(chain, chain.prior_steps)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        target = chain.sample_target(reward, 2000, generator)
        asked = end_states(task, best, pair, 2000, generator)
        uncontrolled = end_states(task, plain, pair, 2000, generator)
        # three seeds at a level of 0.01: by chance one fails in 33
        assert energy_test(asked, target, 199, generator)[1] > 0.01
        assert energy_test(uncontrolled, target, 199, generator)[1] <= 0.005


@pytest.mark.parametrize("learner", ENTRIES)
@pytest.mark.parametrize("schedule", FLOW_FIRST)
def test_a_learner_comes_near_its_floor_and_the_gap_bounds_the_truth(schedule, learner):
    """Cut down: a fifth of the updates, one task."""
    task = Task(schedule, "logistic")
    answers = answers_of(task)
    row, picture = race(task, learner, answers, effort=0.2)
    untrained = sum(chain.outcome(chain.prior_steps, r).true_kl for chain, r in map(answers.of, range(4))) / 4
    assert row["gap_nats"] - row["gap_floor_nats"] < BARS[learner][0] + 3 * row["gap_stderr"]
    assert row["gap_nats"] > row["true_kl_nats"] - 3 * row["gap_stderr"]
    assert row["true_kl_nats"] < 0.3 * untrained
    assert picture.ends.shape == (1000, 2)


@pytest.mark.slow
def test_what_a_control_misses_point_by_point_is_what_it_misses_in_j():
    """For small steps J(best) − J(g) = E_g Σ ½‖u − u*‖², with u* the best control; at 25 some curvature is left."""
    task = Task("flow", "linear-Gaussian")
    answers, pair = answers_of(task), task.conditions.pairs - 1
    chain, reward = answers.of(pair)
    policy, best = learn("adjoint", task, effort=0.1), chain.best(reward)
    exact = Tabulated(chain, best)
    labels, cond = task.conditions.of(torch.full((4000,), pair))
    with torch.no_grad():
        x_1 = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        path = rollout(policy, x_1, task.times, generator=torch.Generator().manual_seed(1), cond=cond, labels=labels)
        missed, whole = 0.0, 0.0
        for i, (t, s) in enumerate(pairwise(task.times)):
            pre, here, ideal = (
                transition(denoiser, path.x[i], t, s, **cond, **control)
                for denoiser, control in ((policy.prior, {}), (policy, {"labels": labels}), (exact, {}))
            )
            missed += float((here.control(pre) - ideal.control(pre)).square().sum(1).mean()) / 2
            whole += float(ideal.control(pre).square().sum(1).mean()) / 2
    excess = chain.outcome(best, reward).objective - answers.outcome(policy, pair).objective
    assert missed == pytest.approx(float(excess), rel=0.25)
    assert missed < 0.5 * whole


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rewards_of_independent_controls_add_to_the_exact_conditional(schedule):
    """p(x | c, y1, y2) ∝ p(x | c) p(y1, y2 | x) with the joint likelihood, built here, against the sum of rewards."""
    task = Task(schedule, "two controls")
    answers, (side, height) = answers_of(task), task.likelihoods(torch.float64).values()
    for pair in range(task.conditions.pairs):
        chain, reward = answers.of(pair)
        one, other = divmod(pair % 4, 2)
        joint = (side.log_prob(chain.x_0).exp()[:, one] * height.log_prob(chain.x_0).exp()[:, other]).log()
        torch.testing.assert_close(reward, joint)
        # and the four labels together are certain
        everything = torch.stack([answers.of(pair - pair % 4 + y)[1] for y in range(4)])
        torch.testing.assert_close(everything.logsumexp(0), torch.zeros(len(reward), dtype=torch.float64))


@pytest.mark.parametrize("schedule", FLOW_FIRST)
def test_one_policy_serves_each_control_alone_and_both_from_marginal_classifiers(schedule):
    """Cut down: seven tenths of the updates. The bar is adjoint's, for every choice of controls by itself."""
    task = Task(schedule, "two controls", nullable=True)
    answers, policy = Answers(task), learn("adjoint", task, effort=0.7)
    asked = task.conditions.combinations != NULL
    over = []
    for pair in range(task.conditions.classes, task.conditions.pairs):  # under the uneven condition
        chain, reward = answers.of(pair)
        best = chain.outcome(chain.best(reward), reward).objective
        over.append(best - answers.outcome(policy, pair).objective)
    for names in ([True, False], [False, True], [True, True]):
        mine = (asked == torch.tensor(names)).all(1)
        assert mine.sum() == (4 if all(names) else 2)
        assert torch.tensor(over)[mine].mean() < BARS["adjoint"][0], over


@pytest.mark.slow
def test_resampling_halves_the_error_of_a_half_trained_policy():
    task = Task("flow", "linear-Gaussian")
    answers, pair, n = Answers(task), task.conditions.pairs - 1, 2000
    chain, reward = answers.of(pair)
    policy, generator = learn("adjoint", task, effort=0.1), torch.Generator().manual_seed(0)
    labels, cond = task.conditions.of(torch.full((n,), pair))
    ends = chain.sample_target(reward, n, generator)
    target = chain.prior(ends, task.times[-1], c=cond["c"]).float()
    x_0 = task.prior()(end_states(task, policy, pair, n, generator), task.times[-1], **cond)
    exact, _ = exact_samples(policy, task.reward(), task.times, generator, labels, cond)
    assert energy_test(exact, target, 1)[0] < 0.5 * energy_test(x_0, target, 1)[0]


def test_the_programme_has_every_learner_on_every_task():
    tasks = dict(programme())
    for schedule in SCHEDULES:
        for likelihood in ("logistic", "two controls", "linear-Gaussian"):
            for gamma in (0.5, 1.0, 2.0):
                assert tasks[Task(schedule, likelihood, gamma)] == ENTRIES
    assert {task.dim for task, _ in programme()} == {2, 32, 256}


@pytest.mark.slow
def test_every_row_of_the_whole_programme_reaches_its_bar(ctrl, tmp_path):
    """`ctrl exact` as a user runs it; most of an hour on two cores."""
    done = ctrl("exact", "--out", tmp_path / "exact", "--quiet", timeout=3 * 3600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "exact" / "exact.json").read_text())["rows"]
    best = {}
    for row in rows:
        if row["gap_floor_nats"] is None:
            continue
        over = row["gap_nats"] - row["gap_floor_nats"]
        assert row["gap_nats"] > row["true_kl_nats"] - 3 * row["gap_stderr"], row
        if row["likelihood"] in ("logistic", "linear-Gaussian") and row["gamma"] in (1.0, 2.0):
            assert over <= BARS[row["learner"]][row["gamma"] == 2.0] + 2 * row["gap_stderr"], row
        if row["likelihood"] == "component" and row["spread"] == 0.4:
            best.setdefault(row["schedule"], []).append(over)
    assert all(min(found) <= 0.20 for found in best.values())


def test_the_energy_distance_is_its_definition():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])
    distance, _ = energy_test(x, y, permutations=1)
    assert distance == pytest.approx(2 * (3 + 2) / 2 - 2 * 1 / 4 - 0)


def test_the_energy_test_keeps_its_level_and_sees_a_shift():
    generator, p = torch.Generator().manual_seed(0), []
    for _ in range(100):
        x, y = torch.randn(2, 60, 2, generator=generator)
        p.append(energy_test(x, y, 99, generator)[1])
    # a level of 0.1 in 100 trials: binomial, 99.9 % of it between 2 and 21
    assert 2 <= sum(value <= 0.1 for value in p) <= 21
    x, y = torch.randn(2, 500, 2, generator=generator)
    assert energy_test(x, y + 0.3, 99, generator)[1] == 0.01
