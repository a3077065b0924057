import math

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow, per_sample
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture, Logistic
from ctrl_diffusion.guide.classifier_guidance import ClassifierGuidance
from ctrl_diffusion.guide.noisy import fit_noisy, with_clock
from ctrl_diffusion.reward.fit import Recipe, any_side_up
from ctrl_diffusion.reward.reward import Reward
from ctrl_diffusion.reward.scorer import Architecture


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_it_comes_to_the_true_noisy_likelihood(schedule):
    """Of a mixture's component p(y | x_t) is known: the responsibilities at x_t."""
    prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]]), 0.3, schedule)
    generator, n, times = torch.Generator().manual_seed(0), 3000, schedule.times(20, 0.1)
    x = prior.sample(n, generator)
    y = ComponentLabel(prior).log_prob(x).exp().multinomial(1, generator=generator).squeeze(1)
    fitted = fit_noisy(x, y, 3, schedule, times, recipe=Recipe(20, 100))
    for t in (times[2], times[10], times[18]):
        alpha, sigma = (float(a) for a in schedule(t))
        x_t = alpha * prior.sample(2000, generator) + sigma * torch.randn(2000, 2, generator=generator)
        exact, found = prior.log_components(x_t, t).log_softmax(1), fitted.log_prob(x_t, t)
        kl = float((exact.exp() * (exact - found)).sum(1).mean())
        # a fit of p parameters to n labels is off by p/(2 n) nats where all matter: 4,600 parameters, of which the
        # early end of 20 epochs lets some tens count
        assert kl < 50 / (2 * n) + 0.01, (t, kl)


def test_held_out_labels_say_when_not_to_believe_the_fit():
    """Labels that have nothing to do with x: what is learned of 120 by heart, at little noise, is no promise."""
    schedule, generator = Cosine(), torch.Generator().manual_seed(0)
    drawn = [
        (torch.randn(n, 2, generator=generator), torch.randint(2, (n,), generator=generator)) for n in (120, 60, 4000)
    ]
    (x, y), held_out, (x_new, y_new) = drawn
    options = {"schedule": schedule, "times": schedule.times(10, 0.02, start=0.05), "recipe": Recipe(100)}
    alpha, sigma = (float(a) for a in schedule(0.03))
    x_t = alpha * x_new + sigma * torch.randn(x_new.shape, generator=generator)
    believed, doubted = (fit_noisy(x, y, 2, held_out=held, **options) for held in (None, held_out))
    nll = [-float(fit.log_prob(x_t, 0.03).gather(1, y_new[:, None]).mean()) for fit in (believed, doubted)]
    # nothing beats log 2; 4,000 labels know an NLL to 0.01, the temperature of 60 is off by little more
    assert nll[0] > math.log(2) + 0.1
    assert nll[1] < math.log(2) + 0.05


def test_one_seed_fits_the_same_whatever_the_global_state():
    """An augmentation draws from the global generator, of the fitting part and of the held-out part alike."""
    schedule, y = Cosine(), torch.arange(40) % 2
    x = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + (y.view(-1, 1, 1, 1) - 0.5)
    options = {"held_out": (x[:20], y[:20]), "recipe": Recipe(2, augment=any_side_up), "seed": 3}
    fits = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        fits.append(fit_noisy(x[20:], y[20:], 2, schedule, schedule.times(5, 0.1), **options).classifier.state_dict())
        assert torch.equal(torch.get_rng_state(), before), "the global state is left alone"
    assert all(torch.equal(value, fits[1][name]) for name, value in fits[0].items())


@pytest.mark.parametrize("conditions", [0, 2])
def test_images_are_guided_with_a_gradient(conditions):
    """Bright from dark, told at any noise; x_0 ~ N(0, I) guided by it is brighter or darker than the prior."""
    schedule, generator = Cosine(), torch.Generator().manual_seed(0)
    times = schedule.times(10, 0.1)
    y = torch.arange(200) % 2
    x = torch.randn(200, 1, 8, 8, generator=generator) + (y.view(-1, 1, 1, 1) - 0.5)
    c = {"c": torch.zeros(200, dtype=torch.long)} if conditions else {}
    fitted = fit_noisy(x, y, 2, schedule, times, None, Architecture(conditions=conditions), Recipe(10), **c)

    class Flat:
        conditional = fitted.conditional

        def log_prob(self, x_t, t, **cond):
            return fitted.log_prob(x_t.view(-1, 1, 8, 8), t, **cond)

    class Given(GaussianMixture):
        """The same whatever the condition."""

        def forward(self, x_t, t, c=None):
            return super().forward(x_t, t)

    prior = Given(torch.zeros(1, 64), 1.0, schedule)
    labels, cond = {"y": torch.arange(40) % 2}, {"c": torch.zeros(40, dtype=torch.long)} if conditions else {}
    reward = Reward({"y": Logistic(torch.ones(64))})
    found = ClassifierGuidance({"y": Flat()})(prior, reward, labels, cond, times, torch.Generator().manual_seed(1), 2.0)
    light = found.x_0.mean(1)
    # a mean of 64 standard normal pixels has an error of 1/8, of 20 such of 0.03
    assert float(light[labels["y"] == 1].mean()) > 4 * 0.03
    assert float(light[labels["y"] == 0].mean()) < -4 * 0.03


@pytest.mark.parametrize("t", [0.3, torch.tensor([0.1, 0.5, 0.9])])
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 4, 4)])
def test_the_clock_is_two_more_channels(shape, t):
    x_t, schedule = torch.randn(shape), RectifiedFlow()
    found = with_clock(x_t, t, schedule)
    assert found.shape == (3, shape[1] + 2, *shape[2:])
    torch.testing.assert_close(found[:, :-2], x_t)
    for channel, value in ((-2, 1 - torch.as_tensor(t)), (-1, torch.as_tensor(t))):
        expected = per_sample(value, x_t)
        torch.testing.assert_close(found[:, channel : channel + 1 or None], (0 * found[:, :1] + expected))
