"""Where y is decided on the way to the data, against mixtures whose posterior is known."""

import math

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.evaluate.information import Profile, denoised_paths, information
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture

N = 1200


def profile_of(schedule, spread, steps=24):
    """The profile of a mixture of two components far apart, and the exact information in nats at the same times."""
    prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), spread, schedule)
    label, times = ComponentLabel(prior), schedule.times(steps, 0.05)
    chain = list(denoised_paths(prior, N, times, torch.Generator().manual_seed(0), {}))
    p_end, group = label.log_prob(chain[-1]).exp(), torch.zeros(N, dtype=torch.long)
    nats = [information(label.log_prob(x), p_end, group) for x in chain]
    return Profile(times[:-1], nats[:-1], nats[-1]), prior, times


def exact_information(prior, spread, t, n=40_000):
    """I(y; x_t) of two even components, from samples of their posterior."""
    generator = torch.Generator().manual_seed(1)
    alpha, sigma = (float(a) for a in prior.schedule(t))
    variance = (alpha * spread) ** 2 + sigma**2
    x = alpha + variance**0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    p = torch.sigmoid(2 * alpha * x / variance)
    entropy = -(p * p.log() + (1 - p) * (1 - p).clamp(min=1e-300).log()).mean()
    return math.log(2) - float(entropy)


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_information_is_bounded_by_what_there_is(schedule):
    """Never above I(y; x_t) by more than its noise, and little below: the fit's regularisation costs 0.05 nat here."""
    profile, prior, _ = profile_of(schedule, 0.25)
    for t, nats in list(zip(profile.times, profile.nats, strict=True))[::4]:
        exact = exact_information(prior, 0.25, t)
        error = 3 * math.log(2) / N**0.5  # a log-loss of two classes spreads by less than log 2 around its mean
        assert exact - 0.05 - error <= nats <= exact + error


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_a_choice_of_modes_is_decided_early(schedule):
    profile, prior, _ = profile_of(schedule, 0.1)
    off, on = profile.interval(prior)
    left, before = (
        exact_information(prior, 0.1, next(t for t in profile.times if float(schedule(t)[1]) <= sigma))
        for sigma in (off, on)
    )
    assert left > 0.9 * math.log(2), "little is left to say below"
    assert before < 0.05 * math.log(2), "little could be said above"


def test_what_is_decided_late_is_wide_and_noise_is_nothing():
    prior = GaussianMixture(torch.zeros(1, 2), 1.0, RectifiedFlow())
    times = tuple(prior.times(10, 0.05)[:-1])
    rising = Profile(times, [0.02 * i for i in range(10)], 0.5)
    assert rising.interval(prior)[0] == 0.0
    assert Profile(times, [0.01] * 10, 0.01).interval(prior) is None


def test_labels_that_c_tells_are_no_information():
    """y is c: nothing that x adds is information about y beyond c."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(N) % 2
    p_end = torch.nn.functional.one_hot(group).float().clamp(0.01, 0.99)
    nothing = information(torch.randn(N, 2, generator=generator), p_end, group)
    alone = information(p_end.log(), p_end, torch.zeros(N, dtype=torch.long))
    assert nothing < 0.01
    assert alone > 0.4
