"""The chains of other programs are theirs step by step, and the certificate holds on them."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler

from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.schedule import RectifiedFlow, VariancePreserving
from ctrl_diffusion.prior.network import NetworkDenoiser
from ctrl_diffusion.run.programs.chains import SAMPLERS, Model, grid_of, scheduler_settings
from ctrl_diffusion.run.programs.files import spans

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = (1 - BETAS).cumprod(0)
SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
MODEL = Model(VariancePreserving(ALPHA_BAR), SETTINGS, clips=False)


def eps(x, timestep):
    """A network that depends on its timestep, smoothly."""
    return torch.tanh(x) * (0.5 + timestep / 2000)


def as_denoiser(grid):
    def call(x_t, timestep):
        return eps(x_t, timestep.view(-1, 1))

    return NetworkDenoiser(torch.nn.Module(), call, grid, "epsilon", (3,))


def ours(program, sampler, steps, noise):
    """The states of the chain on a program's grid, and the last read-out, in float64."""
    grid = grid_of(program, sampler, steps, MODEL)
    return rollout(as_denoiser(grid), noise[0], grid.grid, noise=noise[1:])


@pytest.mark.parametrize("steps", [2, 28, 50])
@pytest.mark.parametrize("program", ["a1111", "comfyui"])
def test_euler_a_of_k_diffusion(program, steps):
    """`sample_euler_ancestral` with `get_sigmas`, on the same noise; in its units x is divided by α."""
    noise = torch.randn(steps, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratios = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()
    place = torch.linspace(999, 0, steps, dtype=torch.float64)
    low = place.floor().long()
    high = place.ceil().long()
    sigmas = ((1 - (place - low)) * ratios[low].log() + (place - low) * ratios[high].log()).exp()
    sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    # both begin with noise of the same size here; A1111's is 0.2 % smaller (docs/reference/models.md)
    x = noise[0] * (1 + sigmas[0] ** 2).sqrt()
    path = ours(program, "euler_a", steps, noise)
    for i in range(steps):
        nearest = (sigmas[i].log() - ratios.log()).abs().argmin().double()  # ComfyUI's `timestep`
        timestep = nearest if program == "comfyui" else place[i]
        x_hat = x - sigmas[i] * eps(x / (1 + sigmas[i] ** 2).sqrt(), timestep)
        up = min(sigmas[i + 1], (sigmas[i + 1] ** 2 * (sigmas[i] ** 2 - sigmas[i + 1] ** 2) / sigmas[i] ** 2) ** 0.5)
        down = (sigmas[i + 1] ** 2 - up**2) ** 0.5
        x = x + (x - x_hat) / sigmas[i] * (down - sigmas[i])
        if i + 1 < steps:
            x = x + up * noise[i + 1]
            torch.testing.assert_close(path.x[i + 1] * (1 + sigmas[i + 1] ** 2).sqrt(), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.x_0, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("sampler", "kind"), [("ddpm", DDPMScheduler), ("euler_a", EulerAncestralDiscreteScheduler)])
@pytest.mark.parametrize("program", ["diffusers", "invokeai"])
def test_the_schedulers_of_diffusers(program, sampler, kind, spacing, monkeypatch):
    """Each of their steps on the same noise; their coefficients are float32, ours float64."""
    settings = SETTINGS | {"timestep_spacing": spacing, "steps_offset": 1}
    model, steps = Model(MODEL.schedule, settings, clips=False), 12
    noise = torch.randn(steps, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheduler = kind.from_config(settings, **({"clip_sample": False} if sampler == "ddpm" else {}))
    scheduler.set_timesteps(steps)
    grid = grid_of(program, sampler, steps, model)
    path = rollout(as_denoiser(grid), noise[0], grid.grid, noise=noise[1:])
    module = __import__(kind.__module__, fromlist=["randn_tensor"])
    draws = iter([*noise[1:], torch.zeros(5, 3)])
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: next(draws).to(torch.float32))
    first = float((1 + scheduler.sigmas[0] ** 2) ** 0.5) if sampler == "euler_a" else 1.0
    x = (noise[0] * first).float()
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(eps(given, t.float()), t, x).prev_sample
        last = i + 1 == steps
        unit = float((1 + scheduler.sigmas[i + 1] ** 2) ** 0.5) if sampler == "euler_a" and not last else 1.0
        # twelve steps of float32 at up to 15 times the unit
        torch.testing.assert_close((path.x_0 if last else path.x[i + 1]).float(), x / unit, rtol=1e-4, atol=1e-4)


def test_names_of_a_sampler_that_the_programs_have():
    assert torch.equal(
        grid_of("comfyui", "euler_ancestral", 9, MODEL).table, grid_of("comfyui", "Euler A", 9, MODEL).table
    )
    assert {name for row in SAMPLERS.values() for name in row} == {"euler_a", "ddpm"}


ZERO = torch.cat([ALPHA_BAR[:-1], torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a1111", "ddpm", 9, MODEL), "--sampler ddpm: of A1111 and Forge there are euler_a"),
        (("comfyui", "dpmpp_2m", 9, MODEL), "the others add no noise"),
        (("comfyui", "euler_a", 1001, MODEL), "--steps 1001: must lie in 2 … 1000"),
        (("comfyui", "euler_a", 9, Model(RectifiedFlow(), {}, False)), "this prior is a flow"),
        (("a1111", "euler_a", 9, Model(VariancePreserving(ZERO), {}, False)), "zero SNR"),
    ],
)
def test_a_chain_that_is_not_certified_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        grid_of(*arguments)


def test_the_settings_of_an_early_pipeline_lie_beside_its_index(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SETTINGS))
    assert scheduler_settings(str(tmp_path)) == SETTINGS


@pytest.mark.parametrize("schedule", [MODEL.schedule, RectifiedFlow(3.0)])
def test_the_span_of_an_interval_is_where_its_noise_levels_lie(schedule):
    """As ComfyUI counts: a share p of the way is at timestep (1 − p) of the last, shifted in a flow."""
    interval = (0.3, 0.8)
    (start, end), (low, high) = spans(interval, schedule)
    whole = float(schedule.timestep(1.0))
    for share, sigma, timestep in ((start, 0.8, high), (end, 0.3, low)):
        even = (1 - share) * whole
        t = (even + 1) / 1000 if isinstance(schedule, VariancePreserving) else even / 1000
        assert float(schedule(schedule.shifted(t))[1]) == pytest.approx(sigma, abs=1e-9)
        assert float(schedule.timestep(schedule.shifted(t))) == pytest.approx(timestep, abs=1e-6)
    assert spans(None, schedule) == (None, None)
