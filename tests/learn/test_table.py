"""What holds for every row of the table of learners."""

import pytest
import torch
from pydantic import Field

from ctrl_diffusion.chain.paths import PriorPaths
from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.step import Evaluations, Learner, LearnerSettings
from ctrl_diffusion.learn.table import LEARNERS, check_learners
from ctrl_diffusion.reward.reward import Reward

TIMES = RectifiedFlow().times(3, 0.1)


class Step(torch.nn.Module):
    """p(y | x) of a threshold, which has no gradient."""

    def log_prob(self, x):
        return torch.stack([x[:, 0] > 0, x[:, 0] <= 0], dim=1).double().clamp(0.1, 0.9).log().float()


def draw(members, states=0):
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(members, 2, generator=generator)
    if not states:
        return x_0
    steps = torch.arange(len(TIMES) - 1).expand(members, -1)
    x = torch.randn(2, *steps.shape, 2, generator=generator)
    return PriorPaths(x_0, steps, x[0], x[1])


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_is_made_of_its_settings(name):
    settings = LEARNERS[name].Settings(batch=7, updates=3)
    learner = LEARNERS[name].from_settings(settings, TIMES, draw, micro=2, offload=True)
    assert learner.settings == settings
    assert (learner.times, learner.batch, learner.micro) == (TIMES, 7, 2)
    assert settings.rows_kept(2) <= 2 * settings.rows_kept(1)
    assert min(settings.evaluations(8)) >= 0
    with pytest.raises(ValueError, match="batch"):
        LEARNERS[name].Settings(batch=0)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_says_whether_it_needs_the_rewards_gradient(name):
    prior = GaussianMixture(torch.zeros(1, 2), 1.0, RectifiedFlow())
    policy = Policy(prior, SideControl("y", ("a", "b"), prior, width=4))
    learner = LEARNERS[name].from_settings(LEARNERS[name].Settings(batch=4, updates=1), TIMES, draw)
    stream = learner(policy, Reward({"y": Step()}), Conditions({}, {"y": 2}), torch.Generator().manual_seed(0))
    if LEARNERS[name].differentiates:
        with pytest.raises(ValueError, match="no gradient"):
            next(stream)
    else:
        assert next(stream).loss.isfinite()


class Mine(Learner):
    class Settings(LearnerSettings):
        updates: int = Field(5, ge=1)
        batch: int = Field(6, ge=1)
        strength: float = 0.5

        def evaluations(self, steps):
            return Evaluations(0, 1)

    def __call__(self, policy, reward, conditions, generator, carried=None):
        yield from ()


def test_a_row_may_come_from_outside(monkeypatch):
    with pytest.raises(ValueError, match="no learner is called 'mine'"):
        check_learners(["mine"])
    monkeypatch.setitem(LEARNERS, "mine", Mine)
    assert check_learners(["weighted", "mine"]) == ["weighted", "mine"]
    assert Mine(TIMES, strength=2.0).settings.strength == 2.0
    assert list(Mine.Settings().stages("mine")) == ["mine"]


def test_an_unknown_name_is_answered_by_the_nearest():
    with pytest.raises(
        ValueError, match="'adjiont'. Did you mean adjoint\\? There are contrast, weighted, adjoint, backprop, ppo"
    ):
        check_learners(["weighted", "adjiont"])
