import pytest
import torch
from diffusers import DDIMScheduler

from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow, VariancePreserving, coefficients
from ctrl_diffusion.prior.network import clock

SCHEDULERS = [
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
]
SCHEDULES = [VariancePreserving(DDIMScheduler(**s).alphas_cumprod) for s in SCHEDULERS] + [Cosine(), RectifiedFlow()]


@pytest.mark.parametrize("config", SCHEDULERS)
def test_entries_are_diffusers_own(config):
    alphas_cumprod = DDIMScheduler(**config).alphas_cumprod.double()
    schedule = VariancePreserving(alphas_cumprod)
    k = torch.arange(1000, dtype=torch.float64)
    alpha, sigma = schedule((k + 1) / 1000)
    # (k + 1)/1000 times 1000 is off by an ulp, times the slope of ᾱ between entries (at most 0.25 · 1000)
    torch.testing.assert_close(alpha**2, alphas_cumprod, rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.timestep((k + 1) / 1000), k, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7, 25])
def test_grid_falls_from_noise_to_sigma_end(schedule, steps):
    times = schedule.times(steps, sigma_end=0.1)
    assert len(times) == steps + 1
    assert times[0] == 1.0
    assert all(s < t for t, s in zip(times[:-1], times[1:], strict=True))
    # the last time is the first at which σ reaches 0.1, up to one entry of the finest table (σ moves ≤ 0.01 there)
    assert 0.1 - 1e-9 <= float(schedule(times[-1])[1]) + 0.005
    assert float(schedule(times[-1])[1]) <= 0.1 + 0.01


@pytest.mark.parametrize(("steps", "sigma_end"), [(0, 0.1), (5, 0.0), (5, 1.0), (5000, 0.1)])
def test_impossible_grids_are_refused(steps, sigma_end):
    with pytest.raises(ValueError, match="steps|sigma_end"):
        SCHEDULES[0].times(steps, sigma_end)


def test_broken_tables_are_refused():
    with pytest.raises(ValueError, match="decreasing"):
        VariancePreserving(torch.tensor([0.9, 0.95]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_coefficients_are_those_of_every_row(schedule):
    """Of a time that is a number, kept from before, or of one time a row: the same to the bit."""
    like, t = torch.zeros(2, 3, 4), 0.43
    of_rows = coefficients(clock, like, schedule, torch.full((2,), t, dtype=torch.float64))
    for _ in range(2):
        for one, each in zip(coefficients(clock, like, schedule, t), of_rows, strict=True):
            assert each.shape == (2, 1, 1)
            assert torch.equal(one.expand(2, 1, 1), each)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("focus", [(0.4, 0.8, 3.0), (0.7, 0.95, 2.0), (0.05, 0.5, 4.0), (0.5, 2.0, 3.0)])
def test_a_focus_multiplies_the_steps_of_its_noise_levels(schedule, focus):
    """Inside there are `density` times as many steps for each outside as an even grid has, up to one at each bound."""
    (low, high, density), steps = focus, 40

    def inside(times):
        return sum(low <= float(schedule(t)[1]) <= high for t in times[:-1])

    even, focused = (schedule.times(steps, 0.1, power=2.0, focus=f) for f in (None, focus))
    assert focused[0] == 1.0
    assert abs(focused[-1] - even[-1]) < 1e-9
    assert all(s < t for t, s in zip(focused[:-1], focused[1:], strict=True))
    for each in (inside(even) - 2, inside(even) + 2):  # a bound may lie on either side of a step
        share = each / steps
        expected = steps * share * density / (1 + share * (density - 1))
        assert (inside(focused) - expected) * (each - inside(even)) < 0
    assert inside(focused) > inside(even)


def test_a_focus_of_once_as_many_steps_is_none():
    for schedule in SCHEDULES:
        even, focused = (schedule.times(20, 0.1, power=2.0, focus=f) for f in (None, (0.4, 0.8, 1.0)))
        assert focused == pytest.approx(even, abs=1e-9)
