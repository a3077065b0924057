"""Describe a model family: what its file reads of a pipeline, and the denoiser that follows."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, get_args

import diffusers
import torch
from torch import nn

from ..chain.codec import Codec
from ..chain.denoise import Prediction
from ..chain.schedule import RectifiedFlow, VariancePreserving
from .network import Call, ControlSite, NetworkDenoiser
from .text import TextFamily


@dataclass
class Family:
    """Describe the network of a pipeline."""

    network: nn.Module
    call: Call
    codec: Codec  # its autoencoder; of a network on pixels the identity, `Codec(shape)`
    site: ControlSite
    classes: int | None = None  # of the condition `c`; None if unconditional
    null: int | None = None  # the class that stands for none; None if the network was not trained with one
    text: TextFamily | None = None  # of a model that is given prompts
    tokens: int = 0  # of one x of a flow, on which its shift may depend; 0 of others


def image_size(
    size: tuple[int, int] | None, sample_size: int | tuple[int, int], factor: int, patch: int = 1
) -> tuple[int, int]:
    """Return (H, W) of images: `size`, or `factor` times that of latents; refuse sides that are no whole patches."""
    sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    height, width = size or (factor * sides[0], factor * sides[1])
    if height % (factor * patch) or width % (factor * patch):
        raise ValueError(f"size {height}×{width}: height and width must be multiples of {factor * patch}")
    return height, width


def check_size(size: tuple[int, int] | None, only: tuple[int, int]) -> None:
    """Refuse a size other than the only one that a network can make."""
    if size and tuple(size) != tuple(only):
        raise ValueError(f"size {size[0]}×{size[1]}: it makes images of {only[0]}×{only[1]} only. Leave size out")


def make_denoiser(family: Family, scheduler: Any) -> NetworkDenoiser:
    """Return the denoiser of a network under its scheduler's schedule, prediction type and clipping, or ValueError."""
    config, kind = scheduler.config, type(scheduler).__name__
    network, call, shape, site = family.network, family.call, family.codec.shape, family.site
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        shift = config["shift"]
        if config.get("use_dynamic_shifting"):  # the shift that the scheduler would set for so many tokens
            few, many = config["base_image_seq_len"], config["max_image_seq_len"]
            low, high = config["base_shift"], config["max_shift"]
            mu = low + (high - low) * (family.tokens - few) / (many - few)
            shift = math.exp(mu) if config.get("time_shift_type") == "exponential" else mu
        return NetworkDenoiser(network, call, RectifiedFlow(shift), "flow", shape, site=site)
    if family.tokens:
        raise ValueError(f"it is a flow, whose schedule is read from FlowMatchEulerDiscreteScheduler, not {kind}")
    if not hasattr(scheduler, "alphas_cumprod") or "prediction_type" not in config:
        raise ValueError(f"its {kind} has no discrete noise schedule to read")
    kinds = [prediction for prediction in get_args(Prediction) if prediction != "flow"]
    if config.prediction_type not in kinds:
        raise ValueError(f"its scheduler's prediction_type is {config.prediction_type!r}; known: {', '.join(kinds)}")
    if config.get("thresholding"):
        raise ValueError("its scheduler asks for dynamic thresholding of x̂, which is not supported")
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
    if clip is not None:
        warnings.warn(f"this prior clips x̂ to ±{clip:g}: saturated pixels give learners no gradient.", stacklevel=3)
    schedule = VariancePreserving(torch.as_tensor(scheduler.alphas_cumprod))
    return NetworkDenoiser(network, call, schedule, config.prediction_type, shape, clip, site)
