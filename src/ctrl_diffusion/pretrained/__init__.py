"""The border to diffusers: a pipeline folder becomes a `Prior`; one small file per family."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SchedulerMixin

from ..denoise import NetworkDenoiser
from ..schedule import VariancePreserving


@dataclass
class Prior:
    """A pre-trained model.

    Args:
        denoiser: E[x_0 | x_t, c], its schedule and the shape (C, H, W) of x.
        classes: number of classes of the condition, None if unconditional; the null class is `classes`.
        source: the folder it came from.
    """

    denoiser: NetworkDenoiser
    classes: int | None
    source: str

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Prior":
        """Load a diffusers pipeline folder.

        Raises:
            ValueError: no such folder, not a pipeline, or a family that is not supported.
        """
        from . import dit  # one import per family, only when asked

        families = {"DiTPipeline": dit.load}
        index = Path(folder) / "model_index.json"
        if not index.is_file():
            raise ValueError(f"{folder} is no pipeline folder of diffusers: it has no model_index.json.")
        name = json.loads(index.read_text())["_class_name"]
        if name not in families:
            raise ValueError(f"{folder} holds a {name}; supported: {', '.join(families)}.")
        denoiser, classes = families[name](Path(folder))
        return cls(denoiser, classes, str(folder))


def schedule_of(scheduler: SchedulerMixin) -> VariancePreserving:
    """The schedule a diffusers scheduler was configured with."""
    return VariancePreserving(torch.as_tensor(scheduler.alphas_cumprod))
