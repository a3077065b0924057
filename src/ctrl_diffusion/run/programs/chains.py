"""Run the chains of other programs: their grids of noise levels, with the Gaussian step they share with ours.

"Euler a" at η = 1 and `ddpm` take the step of `chain/transition.py` at η = 1 on grids of their own, and read x̂ out in a
last step without noise: so k-diffusion, ComfyUI and diffusers (`tests/run/programs/test_chains.py`, step by step).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...chain.rollout import Times
from ...chain.schedule import Schedule, VariancePreserving
from ...prior.parts import part_folder
from ...prior.prior import pipeline_folder
from .table import PROGRAMS

ALIASES = {"euler_ancestral": "euler_a", "k_euler_a": "euler_a"}


class GridSchedule(Schedule):
    """Hold the noise levels of a program's grid, and the timesteps it gives the network, at evenly spaced times."""

    def __init__(self, alpha: Tensor, sigma: Tensor, timesteps: Tensor) -> None:
        rows = (alpha, sigma, timesteps)
        self.table = torch.stack([row.detach().to("cpu", torch.float64) for row in rows])  # (3, N), noise first
        self.size = self.table.shape[1]

    @property
    def grid(self) -> Times:
        """The times of the chain's states, 1 = t_0 > … > t_{N−1}."""
        return tuple(1 - i / self.size for i in range(self.size))

    def _at(self, t: Tensor | float) -> Tensor:
        """Return the three rows (3, *) at time t, linear between the grid's."""
        place = ((1 - torch.as_tensor(t, dtype=torch.float64)) * self.size).round(decimals=9)  # whole on the grid
        table, low = self.table.to(place.device), place.floor().long().clamp(0, self.size - 2)
        return torch.lerp(table[:, low], table[:, low + 1], (place - low).clamp(0, 1))

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        alpha, sigma, _ = self._at(t)
        return alpha, sigma

    def timestep(self, t: Tensor | float) -> Tensor:
        return self._at(t)[2]


def of_ratio(ratio: Tensor, timesteps: Tensor) -> GridSchedule:
    """Return the schedule of ratios σ/α, as k-diffusion names noise levels, variance-preserving."""
    alpha = 1 / (1 + ratio.double().square()).sqrt()
    return GridSchedule(alpha, ratio.double() * alpha, timesteps)


@dataclass(frozen=True)
class Model:
    """Hold what a grid is made of: the prior's schedule, its scheduler's settings, and whether x̂ is clipped."""

    schedule: VariancePreserving
    scheduler: dict[str, Any]
    clips: bool


def k_diffusion(model: Model, steps: int) -> GridSchedule:
    """Return the grid of k-diffusion, even in the timestep from the noisiest to the first; log σ is linear between."""
    alpha_bar = model.schedule.table[1:]
    if alpha_bar[-1] == 0:
        raise ValueError("--as: this prior begins with noise alone (zero SNR), for which that program has no grid.")
    log_ratio = ((1 - alpha_bar) / alpha_bar).log() / 2
    timesteps = torch.linspace(model.schedule.T - 1, 0, steps, dtype=torch.float64)
    low = timesteps.floor().long().clamp(max=model.schedule.T - 2)
    return of_ratio(torch.lerp(log_ratio[low], log_ratio[low + 1], timesteps - low).exp(), timesteps)


def comfyui(model: Model, steps: int) -> GridSchedule:
    """Return the grid "normal" of ComfyUI: that of k-diffusion, with whole timesteps for the network."""
    grid = k_diffusion(model, steps)
    grid.table[2] = grid.table[2].round()
    return grid


def euler_ancestral(model: Model, steps: int) -> GridSchedule:
    """Return the grid of diffusers' EulerAncestralDiscreteScheduler with a pipeline's settings."""
    from diffusers import EulerAncestralDiscreteScheduler

    scheduler = EulerAncestralDiscreteScheduler.from_config(model.scheduler)
    scheduler.set_timesteps(steps)
    return of_ratio(scheduler.sigmas[:-1], scheduler.timesteps)


def ddpm(model: Model, steps: int) -> GridSchedule:
    """Return the grid of diffusers' DDPMScheduler with a pipeline's settings."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(model.scheduler, clip_sample=model.clips)
    scheduler.set_timesteps(steps)
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps].double()
    return GridSchedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), scheduler.timesteps)


# program → its samplers that are Gaussian steps
SAMPLERS: dict[str, dict[str, Callable[[Model, int], GridSchedule]]] = {
    "diffusers": {"euler_a": euler_ancestral, "ddpm": ddpm},
    "comfyui": {"euler_a": comfyui, "ddpm": comfyui},  # the same step by two names
    "a1111": {"euler_a": k_diffusion},
    "invokeai": {"euler_a": euler_ancestral, "ddpm": ddpm},
}


def grid_of(program: str, sampler: str, steps: int, model: Model) -> GridSchedule:
    """Return the grid of a program's sampler; refuse (ValueError) one whose step is no Gaussian of ours."""
    sampler = ALIASES.get(sampler.lower().replace(" ", "_"), sampler.lower().replace(" ", "_"))
    if sampler not in SAMPLERS[program]:
        known = ", ".join(SAMPLERS[program])
        why = "the others add no noise, or none of a Gaussian step, and nothing can be certified for them"
        raise ValueError(f"--sampler {sampler}: of {PROGRAMS[program].title} there are {known}: {why}.")
    if not isinstance(model.schedule, VariancePreserving):
        raise ValueError(
            f"--as {program}: this prior is a flow, whose Gaussian step there has another variance than ours; only the "
            "samplers of diffusion models are certified."
        )
    if not 2 <= steps <= model.schedule.T:
        raise ValueError(f"--steps {steps}: must lie in 2 … {model.schedule.T}.")
    grid = SAMPLERS[program][sampler](model, steps)
    if not bool((grid.table[1].diff() < 0).all()):
        raise ValueError(
            f"--steps {steps}: the grid of {PROGRAMS[program].title} has two equal noise levels. Use fewer."
        )
    return grid


def scheduler_settings(prior: str) -> dict[str, Any]:
    """Read the scheduler's settings of a pipeline."""
    path = part_folder(pipeline_folder(prior), "scheduler") / "scheduler_config.json"
    return json.loads(path.read_text(encoding="utf-8"))
