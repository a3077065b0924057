"""Describe a model family: what each one says of its pipelines."""

import inspect
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
    """What a family's file says of a network.

    Args:
        network: the module that holds the weights.
        call: (x_t, timestep (B,), **cond) → prediction.
        codec: its autoencoder; of a network on pixels the identity, `Codec(shape)`.
        site: where a control enters.
        classes: how many classes the condition `c` has, None if unconditional.
        null: the class that stands for none, None if the network was not trained with one.
        text: of a model that is given prompts.
        tokens: of one x of a flow, on which its shift may depend; 0 of others.
    """

    network: nn.Module
    call: Call
    codec: Codec
    site: ControlSite
    classes: int | None = None
    null: int | None = None
    text: TextFamily | None = None
    tokens: int = 0


def default_guidance(pipeline: Any) -> float:
    """The guidance of a pipeline's own default."""
    return inspect.signature(pipeline.__call__).parameters["guidance_scale"].default


def sized(
    size: tuple[int, int] | None, sample_size: int | tuple[int, int], factor: int, patch: int = 1
) -> tuple[int, int]:
    """(H, W) of images: as asked, or of a network's latents.

    Raises:
        ValueError: not a multiple of what one patch of latents covers.
    """
    sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    height, width = size or (factor * sides[0], factor * sides[1])
    if height % (factor * patch) or width % (factor * patch):
        raise ValueError(f"size {height}×{width}: height and width must be multiples of {factor * patch}")
    return height, width


def fixed(size: tuple[int, int] | None, own: tuple[int, int]) -> None:
    """Refuse another size than a network's own."""
    if size and tuple(size) != tuple(own):
        raise ValueError(f"size {size[0]}×{size[1]}: it makes images of {own[0]}×{own[1]} only. Leave size out")


def flow_of(config: dict[str, Any], tokens: int) -> RectifiedFlow:
    """The schedule of a flow, its shift as the scheduler would set it for so many tokens."""
    if not config.get("use_dynamic_shifting"):
        return RectifiedFlow(config["shift"])
    few, many = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    mu = low + (high - low) * (tokens - few) / (many - few)
    return RectifiedFlow(math.exp(mu) if config.get("time_shift_type") == "exponential" else mu)


def denoiser_of(family: Family, scheduler: Any) -> NetworkDenoiser:
    """A network under the schedule, prediction type and clipping its scheduler was configured with."""
    config = scheduler.config
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        schedule = flow_of(config, family.tokens)
        return NetworkDenoiser(family.network, family.call, schedule, "flow", family.codec.shape, None, family.site)
    if family.tokens:
        raise ValueError(
            f"it is a flow, whose schedule is read from FlowMatchEulerDiscreteScheduler, not {type(scheduler).__name__}"
        )
    if not hasattr(scheduler, "alphas_cumprod") or "prediction_type" not in config:
        raise ValueError(f"its {type(scheduler).__name__} has no discrete noise schedule to read")
    known = [kind for kind in get_args(Prediction) if kind != "flow"]
    if config.prediction_type not in known:
        raise ValueError(f"its scheduler's prediction_type is {config.prediction_type!r}; known: {', '.join(known)}")
    if config.get("thresholding"):
        raise ValueError("its scheduler asks for dynamic thresholding of x̂, which is not supported")
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
    if clip is not None:
        warnings.warn(f"this prior clips x̂ to ±{clip:g}: saturated pixels give learners no gradient.", stacklevel=3)
    schedule = VariancePreserving(torch.as_tensor(scheduler.alphas_cumprod))
    return NetworkDenoiser(
        family.network, family.call, schedule, config.prediction_type, family.codec.shape, clip, family.site
    )
