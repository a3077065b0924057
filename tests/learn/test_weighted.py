"""Laws of reward-weighted regression, in closed form under a prior whose x̂ is zero."""

import warnings

import pytest
import torch

from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture, Logistic
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.weighted import RENOISING, Weighted
from ctrl_diffusion.reward.reward import Reward

TIMES = (0.8, 0.1)  # a chain of one step: every sample is noised to t = 0.8, where σ = 0.8
CONDITIONS = Conditions({"c": torch.arange(2)}, {"y": 2})
REWARD = Reward({"y": Logistic(torch.tensor([1.0, 0.0]))}, gamma=0.7)


class Zero(GaussianMixture):
    def forward(self, x_t, t, c=None):
        return torch.zeros_like(x_t)


def zero_policy():
    prior = Zero(torch.zeros(1, 2), 1.0, RectifiedFlow())
    return Policy(prior, SideControl("y", ("a", "b"), prior, conditions=2, width=8))


def loss_of(learner, policy, seed=0):
    return float(next(learner(policy, REWARD, CONDITIONS, torch.Generator().manual_seed(seed))).loss.detach())


@pytest.mark.parametrize("even", [False, True])
def test_samples_are_drawn_by_weight_within_their_condition(even):
    """With x̂ = 0 the loss is the mean of ½‖x_0/σ‖², over pairs (c, y) and over x_0 by p̂(y | x_0)^γ."""
    members, n = 40, 20_000
    x_0 = torch.randn(2 * members, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2.0])
    x_0[members:] += 1.0
    exponent = 0.0 if even else REWARD.gamma
    w = (exponent * REWARD.classifiers["y"].log_prob(x_0).view(2, members, 2)).softmax(1)
    squares = 0.5 * x_0.square().sum(1).view(2, members, 1) / 0.8**2
    mean = float((w * squares).sum(1).mean())
    variance = float((w * squares.square()).sum(1).mean()) - mean**2
    loss = loss_of(Weighted(x_0, TIMES, n, even=even), zero_policy())
    assert loss == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)


RARE = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3, RectifiedFlow(), torch.tensor([0.999, 0.001]))


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_a_y_that_hardly_any_sample_has_is_said_before_it_is_learned(few, even):
    """By its name and hits, in one line; at even weights nothing is learned of y."""
    generator = torch.Generator().manual_seed(0)
    x_0 = RARE.means[torch.zeros(300, dtype=torch.long)] + 0.3 * torch.randn(300, 2, generator=generator)
    if not few:
        x_0[:150] *= -1
    conditions = Conditions({}, {"y": 2}, names={"y": ("pale", "dark")})
    policy = Policy(RARE, SideControl("y", ("pale", "dark"), RARE, width=4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = Weighted(x_0, TIMES, 8, even=even)(policy, Reward({"y": ComponentLabel(RARE)}), conditions, generator)
        next(steps)
        next(steps)
    lines = [str(each.message) for each in caught]
    assert len(lines) == (1 if few and not even else 0)
    if lines:
        assert (
            lines[0]
            == "weighted learns from a handful of 300 prior samples: y = dark (0.0 hits). Raise weighted.cache."
        )


def test_what_renoising_learned_is_subtracted_from_the_target():
    """If re-noising learned just the policy's shift of x̂, the loss is that of twice the shift without a correction."""
    x_0 = torch.randn(80, 2, generator=torch.Generator().manual_seed(1))
    policy = zero_policy()
    outer = policy.controls["y"].outer[-1]
    with torch.no_grad():
        for i, p in enumerate(outer.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    corrected = loss_of(Weighted(x_0, TIMES, 64, learned_renoising=policy.snapshot()), policy)
    plain = loss_of(Weighted(x_0, TIMES, 64), policy)
    with torch.no_grad():
        for p in outer.parameters():
            p.mul_(2)
    doubled = loss_of(Weighted(x_0, TIMES, 64), policy)
    assert corrected == pytest.approx(doubled, rel=1e-5)
    assert abs(corrected - plain) > 0.1 * plain


def test_renoising_is_a_stage_of_its_own_on_the_same_samples():
    settings = Weighted.Settings(updates=70, renoising=30, batch=8, cache=5)
    assert {name: stage.updates for name, stage in settings.stages("weighted").items()} == {
        RENOISING: 30,
        "weighted": 70,
    }
    assert list(Weighted.Settings(renoising=0).stages("weighted")) == ["weighted"]
    learner = Weighted.from_settings(settings, TIMES, lambda members: torch.arange(2.0 * members)[:, None], micro=3)
    even = learner.at_even_weights()
    assert (len(learner.x_0), learner.batch, learner.micro, learner.even) == (10, 8, 3, False)
    assert (even.even, even.x_0 is learner.x_0) == (True, True)
