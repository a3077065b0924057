"""The border to diffusers: a pipeline folder becomes a `Prior`; one small file per family."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ..denoise import ControlSite, Network, NetworkDenoiser
from ..schedule import VariancePreserving


@dataclass
class Family:
    """What a family's file says of a network.

    Args:
        network: the module that holds the weights.
        call: (x_t, timestep (B,), **cond) → prediction.
        shape: (C, H, W) of one x.
        site: where a control enters.
        classes: how many classes the condition `c` has, None if unconditional.
        null: the class that stands for none, None if the network was not trained with one.
    """

    network: nn.Module
    call: Network
    shape: tuple[int, int, int]
    site: ControlSite
    classes: int | None
    null: int | None = None


@dataclass
class Prior:
    """A pre-trained model.

    Args:
        denoiser: E[x_0 | x_t, c], its schedule and the shape (C, H, W) of x.
        classes: number of classes of the condition, None if unconditional.
        names: every name a class is known by → its number; the number itself is always one.
        null: the class that stands for none, None if the network was not trained with one.
    """

    denoiser: NetworkDenoiser
    classes: int | None
    names: dict[str, int]
    null: int | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name of every class, in order: the first it is known by, else its number."""
        called = {number: name for name, number in reversed(self.names.items())}
        return tuple(called[i] for i in range(self.classes or 0))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Prior":
        """Load a diffusers pipeline folder.

        Raises:
            ValueError: no such folder, not a pipeline, damaged, or of a kind that is not supported.
        """
        from . import dit, unet  # one import per family, only when asked

        families = {"DDPMPipeline": unet.load, "DDIMPipeline": unet.load, "DiTPipeline": dit.load}
        folder = Path(folder)
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no pipeline folder of diffusers: it has no model_index.json.")
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            name, scheduler = index["_class_name"], index["scheduler"][1]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}/model_index.json is not one that diffusers writes ({error!r}).") from error
        if name not in families:
            raise ValueError(f"{folder} holds a {name}; supported: {', '.join(families)}.")
        if (index.get("vae") or [None])[0] is not None:
            raise ValueError(f"{folder} is a latent model: it has a VAE. So far only pixel models are supported.")
        try:
            family = families[name](folder)
            settings = getattr(diffusers, scheduler).from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder} cannot be loaded: {reason}") from error
        denoiser = denoiser_of(family, settings, folder)
        names = {
            synonym.strip(): int(number)
            for number, text in index.get("id2label", {}).items()
            for synonym in text.split(",")
        }
        names |= {str(i): i for i in range(family.classes or 0)}
        return cls(denoiser, family.classes, names, family.null)

    def unconditional(self) -> "Prior":
        """p(x) of a prior of p(x | c): the same network, always asked for its null class.

        Raises:
            ValueError: it is unconditional already, or was not trained with a null class.
        """
        if self.null is None:
            reason = "is unconditional already" if self.classes is None else "was not trained with a class for none"
            raise ValueError(f"unconditional: this prior {reason}. Leave it out.")
        conditional = self.denoiser

        def call(x_t: Tensor, timestep: Tensor) -> Tensor:
            return conditional.call(x_t, timestep, c=torch.full_like(timestep, self.null, dtype=torch.long))

        denoiser = NetworkDenoiser(
            conditional.network, call, conditional.schedule, conditional.prediction, conditional.shape,
            conditional.clip, conditional.site,
        )  # fmt: skip
        return replace(self, denoiser=denoiser, classes=None, names={}, null=None)


def denoiser_of(family: Family, scheduler: Any, folder: Path) -> NetworkDenoiser:
    """A network under the schedule, prediction type and clipping its scheduler was configured with."""
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod") or "prediction_type" not in config:
        raise ValueError(f"{folder} uses {type(scheduler).__name__}, which has no discrete noise schedule to read.")
    if config.get("thresholding"):
        raise ValueError(f"{folder} asks for dynamic thresholding of x̂, which is not supported.")
    clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
    if clip is not None:
        warnings.warn(f"this prior clips x̂ to ±{clip:g}: saturated pixels give learners no gradient.", stacklevel=3)
    schedule = VariancePreserving(torch.as_tensor(scheduler.alphas_cumprod))
    return NetworkDenoiser(
        family.network, family.call, schedule, config.prediction_type, family.shape, clip, family.site
    )
