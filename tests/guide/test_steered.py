"""Laws of a guided denoiser."""

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.exact.mixtures import GaussianMixture, Logistic
from ctrl_diffusion.guide.classifier_guidance import ClassifierGuidance
from ctrl_diffusion.guide.reconstruction import DPS, MPGD
from ctrl_diffusion.guide.steered import Guidance, gradient, tweedie_factor
from ctrl_diffusion.reward.reward import Reward

LIKELIHOOD = Logistic(torch.tensor([1.0, -0.5]))
LABELS = {"y": torch.tensor([0, 1, 1])}
X_T = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 0.1]])


class Noisy:
    """Any function of x_t and t."""

    def log_prob(self, x_t, t):
        return LIKELIHOOD.log_prob(x_t)


class Shift(Guidance):
    """Moves x̂ by the strength."""

    def x_hat(self, target, x_t, t):
        return target.denoiser(x_t, t, **target.cond) + target.strength


GUIDANCES = {"classifier guidance": ClassifierGuidance({"y": Noisy()}), "DPS": DPS(), "MPGD": MPGD(), "shift": Shift()}
SCHEDULES = [Cosine(), RectifiedFlow()]


def prior(schedule):
    return GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3, schedule)


@pytest.mark.parametrize("name", GUIDANCES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [1.0, 0.9, 0.1])
def test_without_labels_or_at_strength_0_it_is_the_prior_bit_for_bit(name, schedule, t):
    base = prior(schedule)
    guided = GUIDANCES[name].steered(base, Reward({"y": LIKELIHOOD}))
    for control in ({}, {"labels": {}}, {"labels": LABELS, "strength": 0.0}):
        assert torch.equal(guided(X_T, t, **control), base(X_T, t))
    assert guided.prior is base


@pytest.mark.parametrize("name", ["classifier guidance", "DPS", "MPGD"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("alpha", [0.0, 1e-12, 1e-6, 1e-4])
def test_it_is_finite_where_alpha_is_next_to_nothing(name, schedule, alpha):
    guided = GUIDANCES[name].steered(prior(schedule), Reward({"y": LIKELIHOOD}))
    t = 1.0 - alpha
    x_hat = guided(X_T, t, labels=LABELS)
    assert x_hat.isfinite().all()
    assert x_hat.abs().max() < 10, "x_0 is of order one"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_factor_is_tweedies_and_nothing_at_pure_noise(schedule):
    for t in (0.2, 0.8):
        alpha, sigma = schedule(t)
        torch.testing.assert_close(tweedie_factor(schedule, t, X_T).flatten()[0].double(), (sigma**2 / alpha).double())
    assert float(tweedie_factor(schedule, 1.0, X_T).flatten()[0]) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_has_the_priors_std_and_a_mean_moved_by_the_shift_of_x_hat(schedule):
    base, labels = prior(schedule), LABELS
    guided = Shift().steered(base, Reward({"y": LIKELIHOOD}))
    plain = transition(base, X_T, 0.6, 0.4)
    one, two = (transition(guided, X_T, 0.6, 0.4, labels=labels, strength=w) for w in (1.0, 2.0))
    assert torch.equal(one.std, plain.std)
    torch.testing.assert_close(two.mean - plain.mean, 2 * (one.mean - plain.mean))  # the mean is linear in x̂


def test_a_gradient_does_not_depend_on_the_loss_scale():
    x = X_T.clone().requires_grad_()
    reward = Reward({"y": LIKELIHOOD})(x, LABELS)
    once = torch.autograd.grad(reward.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(gradient(reward, x, 2.0**10), once)
    with pytest.raises(ValueError, match="no gradient"):
        gradient(reward.detach(), x)
