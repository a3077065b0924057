"""Learners of several γ: each row's reward and weights are those of its own γ."""

import pytest
import torch

from ctrl_diffusion.chain.paths import paths, paths_with_states
from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn import weighted
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.contrast import Contrast
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.reward.reward import Reward, prior_table

FLOW = RectifiedFlow()
TIMES, B, GAMMAS = FLOW.times(6, 0.1), 24, (1.0, 0.5, 2.0, 4.0)


class Always(Conditions):
    """Draws γ = 2 alone, and no random number."""

    def draw_gamma(self, n, generator):
        return {"gamma": torch.full((n,), 2.0)}


def policy_of(gammas=(0.25, 4.0)):
    prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.5, FLOW)
    policy = Policy(prior, SideControl("y", "ab", prior, width=8, gammas=gammas))
    with torch.no_grad():
        for i, p in enumerate(policy.trainable()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return policy


def learner_of(name, policy, **options):
    if name == "weighted":
        x_0 = paths(policy.prior, 60, TIMES, torch.Generator().manual_seed(1)).x_0
        return Weighted(x_0, TIMES, B, **options)
    if name == "contrast":
        steps = torch.arange(len(TIMES) - 1).expand(60, -1)
        drawn = paths_with_states(policy.prior, steps, TIMES, torch.Generator().manual_seed(1))
        return Contrast(drawn, TIMES, B, **options)
    kinds = {"adjoint": Adjoint, "backprop": Backprop, "ppo": PPO}
    return kinds[name](TIMES, B, **options)


LEARNERS = ["contrast", "weighted", "adjoint", "backprop", "ppo"]


def gradient(name, policy, reward, conditions):
    step = next(learner_of(name, policy)(policy, reward, conditions, torch.Generator().manual_seed(2)))
    gradients = torch.autograd.grad(step.loss, policy.trainable(), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("name", LEARNERS)
def test_rows_of_one_gamma_are_learned_from_as_a_run_of_that_gamma(name):
    policy = policy_of()
    classifiers = {"y": ComponentLabel(policy.base)}
    ours = gradient(name, policy, Reward(classifiers), Always({}, {"y": 2}, gammas=(1.0, 2.0)))
    policy.gamma = 2.0  # at which it is called where no row has a γ
    expected = gradient(name, policy, Reward(classifiers, 2.0), Conditions({}, {"y": 2}))
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", LEARNERS)
def test_the_first_update_does_not_depend_on_the_micro_batch(name):
    norms = []
    for micro in (None, 5):
        policy = policy_of()
        reward, conditions = Reward({"y": ComponentLabel(policy.base)}), Conditions({}, {"y": 2}, gammas=GAMMAS)
        stream = learner_of(name, policy, micro=micro)(policy, reward, conditions, torch.Generator().manual_seed(0))
        norms.append(next(fit(policy, stream, 1, {"embedding": 1e-3, "adapter": 1e-3})).gradient_norm)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_table_is_learned(name):
    policy = policy_of()
    reward, conditions = Reward({"y": ComponentLabel(policy.base)}), Conditions({}, {"y": 2}, gammas=GAMMAS)
    before = [table.weight.clone() for table in policy.controls["y"].of_gamma]
    stream = learner_of(name, policy)(policy, reward, conditions, torch.Generator().manual_seed(0))
    assert len(list(fit(policy, stream, 9, {"embedding": 1e-2, "adapter": 1e-3}))) == 9
    for old, table in zip(before, policy.controls["y"].of_gamma, strict=True):
        assert (old[:2] - table.weight[:2]).abs().min() > 0
        assert torch.equal(old[2], table.weight[2]), "null stays null"


def test_weights_are_those_of_each_gamma(monkeypatch):
    """The mean of log p̂ over what is drawn at γ is that of prior samples weighted by p̂^γ."""
    policy = policy_of()
    reward, conditions = Reward({"y": ComponentLabel(policy.base)}), Conditions({}, {"y": 2}, gammas=GAMMAS)
    learner, drawn = learner_of("weighted", policy), []
    monkeypatch.setattr(weighted, "regression", lambda *given: iter([drawn.append((given[1], given[3], given[-1]))]))
    stream = learner(policy, reward, conditions, torch.Generator().manual_seed(0))
    for _ in range(300):
        next(stream)
    x_0, y = torch.cat([x for x, _, _ in drawn]), torch.cat([labels["y"] for _, labels, _ in drawn])
    gamma = torch.cat([row["gamma"] for _, _, row in drawn])
    table = prior_table(reward, conditions, learner.x_0)[0]
    log_p = reward(x_0, {"y": y})
    for value in GAMMAS:
        expected = ((value * table).softmax(0) * table).sum(0)
        for label in (0, 1):
            of_cell = log_p[(gamma == value) & (y == label)]
            error = 4 * float(of_cell.std()) / len(of_cell) ** 0.5
            assert float(of_cell.mean()) == pytest.approx(float(expected[label]), abs=error)


def test_rewards_are_multiplied_row_by_row():
    policy = policy_of()
    reward, gamma = Reward({"y": ComponentLabel(policy.base)}, 3.0), torch.tensor([0.5, 1.0, 2.0, 4.0])
    x, labels = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), {"y": torch.tensor([0, 1, -1, 1])}
    rows = reward(x, labels, gamma=gamma)
    for i, value in enumerate(gamma.tolist()):
        assert float(rows[i]) == pytest.approx(float(reward.at(value)(x, labels)[i]), rel=1e-6)
    assert rows[2] == 0
