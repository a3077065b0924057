"""Describe a model family: what its file reads of a pipeline, and the denoiser that follows."""

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..chain.codec import Codec
from .network import Call, ControlSite, NetworkDenoiser
from .scheduler import read_schedule
from .text.prompted import TextFamily


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


def sides_of(sample_size: Any) -> tuple[int, int]:
    """Return height and width of what a config says of them, in one number or two; refuse one that says nothing."""
    if sample_size is None:
        raise ValueError("its config does not say sample_size. Name the height and width of the images with --size")
    sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise ValueError(f"its config's sample_size must be a height and a width, or one number, got {sample_size!r}")
    return tuple(sides)


def image_size(
    size: tuple[int, int] | None, sample_size: int | tuple[int, int] | None, factor: int, patch: int = 1
) -> tuple[int, int]:
    """Return (H, W) of images: `size`, or `factor` times that of latents; refuse sides that are no whole patches."""
    height, width = size or (factor * side for side in sides_of(sample_size))
    if height % (factor * patch) or width % (factor * patch):
        raise ValueError(f"size {height}×{width}: height and width must be multiples of {factor * patch}")
    return height, width


def check_size(size: tuple[int, int] | None, only: tuple[int, int]) -> None:
    """Refuse a size other than the only one that a network can make."""
    if size and tuple(size) != tuple(only):
        raise ValueError(f"size {size[0]}×{size[1]}: it makes images of {only[0]}×{only[1]} only. Leave size out")


def default_size(pipeline: Any) -> tuple[int, int]:
    """Return (H, W) of the images that a pipeline makes by default, off its signature."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return parameters["height"].default, parameters["width"].default


def check_sides(size: tuple[int, int], patch: int, *most: int) -> None:
    """Refuse a size of more patches (of `patch` pixels a side) than a network has positions for, a side or in both."""
    for side, longest in zip(size, most * (2 // len(most)), strict=True):
        if side > patch * longest:
            raise ValueError(f"size {size[0]}×{size[1]}: it has no positions beyond {patch * longest} pixels a side")


def check_class(part: str, module: nn.Module, *known: str) -> None:
    """Refuse a part that is of none of the classes of diffusers with these names, which take a second to import."""
    kind = type(getattr(module, "_orig_mod", module))  # in torch.compile's wrapper
    if not {base.__name__ for base in kind.__mro__} & set(known):
        raise ValueError(f"its {part} is a {kind.__name__}, and this pipeline needs: {', '.join(known)}")


def check_channels(part: str, given: int, predicted: int, channels: int) -> None:
    """Refuse a network that is given more than x, or does not predict x, or x and its variance."""
    if given != channels:
        raise ValueError(
            f"its {part} is given {given} channels, and x has {channels}: the others, of an image or a mask, are not "
            "supported"
        )
    if predicted not in (channels, 2 * channels):
        raise ValueError(
            f"its {part} predicts {predicted} channels for {channels}: needed are as many, or twice as many (a learned "
            "variance)"
        )


def refuse_inputs(part: str, config: Any, inputs: dict[str, tuple[Any, ...]]) -> None:
    """Refuse a network that wants inputs which the chain does not give, by the values of its config that want none."""
    for name, fine in inputs.items():
        if (value := config.get(name)) not in fine:
            raise ValueError(f"its {part} has {name} {value!r}: it is given an input that is not supported")


def make_denoiser(family: Family, scheduler: Any) -> NetworkDenoiser:
    """Return the denoiser of a network under its scheduler's schedule, prediction type and clipping, or ValueError."""
    schedule, prediction, clip = read_schedule(scheduler, family.tokens)
    if clip is not None:
        advice = "If its pictures need none, set clip_sample to false in its scheduler_config.json."
        text = f"this prior clips x̂ to ±{clip:g}: saturated pixels give learners no gradient. {advice}"
        warnings.warn(text, stacklevel=3)
    shape = family.codec.shape
    return NetworkDenoiser(family.network, family.call, schedule, prediction, shape, clip, family.site)
