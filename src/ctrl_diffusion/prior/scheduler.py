"""Read the noise schedule off a scheduler of diffusers, and say which of its settings the chain does not follow."""

import inspect
import math
from typing import Any, NamedTuple, get_args

import diffusers
import torch

from ..chain.denoise import Prediction
from ..chain.schedule import RectifiedFlow, Schedule, VariancePreserving

FLOW = "FlowMatchEulerDiscreteScheduler"
FEW_STEPS = ("LCMScheduler", "TCDScheduler")
TIMESTEPS = 1000  # of a flow: `RectifiedFlow.timestep` counts to it
# settings of how a scheduler samples, with what the chain does (or a value that changes nothing): its steps are those
# of DDPM or DDIM, of first order, on a grid even in t that begins with noise and reads x̂ out at the end
CHAIN: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("trailing",), "steps_offset": (0,), "set_alpha_to_one": (True,),
    "variance_type": (None, "fixed_small", "fixed_small_log"), "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None), "use_lu_lambdas": (False, None),
    "sigma_min": (None,), "sigma_max": (None,), "final_sigmas_type": (None, "zero"), "solver_order": (1,),
    "predictor_order": (1,), "corrector_order": (0,), "lambda_min_clipped": (-math.inf,), "shift_terminal": (None,),
    "stochastic_sampling": (False,),
}  # fmt: skip


class ReadSchedule(NamedTuple):
    """Hold what a scheduler says of the model."""

    schedule: Schedule
    prediction: Prediction
    clip: float | None  # x̂ is clamped to ±clip


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Return the settings that a scheduler reads; those of other classes in its config mean nothing to it."""
    names = inspect.signature(type(scheduler)).parameters
    return {name: value for name, value in scheduler.config.items() if name in names}


def not_followed(scheduler: Any) -> dict[str, Any]:
    """Return the settings of how a scheduler samples that the chain does not follow, but for those that change nothing.

    A schedule up to zero SNR that the scheduler's class does not read, though its config names it, is one of them.
    """
    settings, config = settings_of(scheduler), scheduler.config
    ignored = {name: value for name, value in settings.items() if name in CHAIN and value not in CHAIN[name]}
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in settings:
        ignored["rescale_betas_zero_snr"] = True
    return ignored


def read_schedule(scheduler: Any, tokens: int) -> ReadSchedule:
    """Read schedule, prediction type and clipping; `tokens` are those of one x of a flow, 0 of other models.

    Raises ValueError for a scheduler, or a setting of it, that gives the network another meaning than the chain does.
    """
    kind, settings = type(scheduler).__name__, settings_of(scheduler)
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        return ReadSchedule(RectifiedFlow(read_shift(settings, tokens)), "flow", None)
    if tokens:
        raise ValueError(f"it is a flow, whose schedule is read from {FLOW}, not {kind}")
    if kind in FEW_STEPS:
        raise ValueError(
            f"its {kind} belongs to a model distilled for few steps, which does not predict the mean of x_0. Use the "
            "model it was distilled from"
        )
    alphas_cumprod = torch.as_tensor(getattr(scheduler, "alphas_cumprod", ())).clone()
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2 or "prediction_type" not in settings:
        raise ValueError(f"its {kind} has no discrete noise schedule to read")
    prediction, kinds = settings["prediction_type"], [name for name in get_args(Prediction) if name != "flow"]
    if prediction not in kinds:
        raise ValueError(f"its scheduler's prediction_type is {prediction!r}; known: {', '.join(kinds)}")
    if settings.get("thresholding"):
        raise ValueError("its scheduler asks for dynamic thresholding of x̂, which is not supported")
    if settings.get("use_flow_sigmas"):
        raise ValueError(f"its {kind} has use_flow_sigmas: it is a flow, whose schedule is read from {FLOW}")
    if settings.get("timestep_type") == "continuous" and prediction == "v_prediction":
        raise ValueError(
            f"its {kind} has timestep_type continuous: its network is given log σ, not a discrete timestep"
        )
    clip = (
        number_of({"clip_sample_range": 1.0, **settings}, "clip_sample_range") if settings.get("clip_sample") else None
    )
    if settings.get("rescale_betas_zero_snr") and alphas_cumprod[-1] >= alphas_cumprod[-2]:
        alphas_cumprod[-1] = 0.0  # some schedulers write 2⁻²⁴ in its place, since they divide by it
    return ReadSchedule(VariancePreserving(alphas_cumprod), prediction, clip)


def number_of(settings: dict[str, Any], name: str) -> float:
    """Return a setting that must be a positive number."""
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"its scheduler's {name} must be a positive number, got {value!r}")
    return value


def read_shift(settings: dict[str, Any], tokens: int) -> float:
    """Return the shift of a flow's grid; refuse settings that reverse its time, or give the network another clock."""
    if settings.get("invert_sigmas"):
        raise ValueError(f"its {FLOW} has invert_sigmas: its time runs from data to noise, which is not supported")
    if (steps := settings.get("num_train_timesteps", TIMESTEPS)) != TIMESTEPS:
        raise ValueError(f"its {FLOW} counts {steps} timesteps (num_train_timesteps); {TIMESTEPS} are supported")
    if not settings.get("use_dynamic_shifting"):
        return number_of(settings, "shift")
    # the shift it would set for the tokens
    few, many = number_of(settings, "base_image_seq_len"), number_of(settings, "max_image_seq_len")
    low, high = number_of(settings, "base_shift"), number_of(settings, "max_shift")
    if few == many:
        raise ValueError(f"its {FLOW} has one length, {few}, for base_image_seq_len and max_image_seq_len")
    mu = low + (high - low) * (tokens - few) / (many - few)
    return math.exp(mu) if settings.get("time_shift_type") == "exponential" else mu
