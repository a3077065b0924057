"""Open a pre-trained model: a pipeline folder of diffusers becomes a `Prior`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..chain.codec import Codec
from .families import FAMILIES
from .family import denoiser_of
from .loader import located, opened
from .network import NetworkDenoiser
from .precision import PRECISIONS
from .text import Prompted, TextFamily

DIGITS = Path(__file__).parent / "digits"
EMBEDDED = "digits"  # the prior that ships with the package, by name


@dataclass
class Prior:
    """A pre-trained model.

    Args:
        denoiser: E[x_0 | x_t, c], its schedule and the shape (C, H, W) of x.
        classes: number of classes of the condition, None if unconditional; prompts are classes too.
        names: every name a class is known by → its number; the number itself is one, unless they are prompts.
        null: the class that stands for none, None if the network was not trained with one.
        codec: turns x into images: the autoencoder of a latent model, else the identity.
        text: of a model that is given prompts.
        pipeline: the name of its pipeline.
    """

    denoiser: NetworkDenoiser
    classes: int | None
    names: dict[str, int]
    null: int | None = None
    codec: Codec = field(default_factory=Codec)
    text: TextFamily | None = None
    pipeline: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name of every class, in order: the first it is known by, else its number."""
        called = {number: name for name, number in reversed(self.names.items())}
        return tuple(called[i] for i in range(self.classes or 0))

    @property
    def latent(self) -> bool:
        """Whether x are latents of images and not images."""
        return self.codec.latent

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images, which for a latent model are not the shape of x."""
        return self.codec.image_shape or self.denoiser.shape

    def decode(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of x (B, *), differentiable; x itself unless it is a latent model."""
        return self.codec.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return x (B, *) of images (B, C, H, W), where these are."""
        return self.codec.encode(images, self.denoiser.device)

    def placed(self, device: str = "auto", precision: str = "no", tiling: bool = False) -> "Prior":
        """The same prior, its network on a device; the autoencoder follows when it is needed, encoders stay.

        Args:
            device: as torch names it; "auto" for an accelerator of CUDA if there is one.
            precision: of the network's own arithmetic: "no" for that of its weights, "bf16" or "fp16" by autocast.
            tiling: decode large images in tiles.

        Raises:
            ValueError: there is no such device.
        """
        try:
            self.denoiser.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        except (RuntimeError, AssertionError) as error:  # torch built without it raises the latter
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"device: {device!r} is not to be had here ({reason}). Use auto.") from error
        self.denoiser.set_precision(PRECISIONS[precision])
        if tiling:
            self.codec.enable_tiling()
        return self

    @classmethod
    def from_pretrained(cls, source: str | Path, size: tuple[int, int] | None = None) -> "Prior":
        """Load a diffusers pipeline, a folder or a hub id.

        A model that is given text knows no class yet: see `with_prompts`.

        Args:
            source: the folder, or OWNER/NAME.
            size: (H, W) of the images, for families that make any; None for the one it was trained on.

        Raises:
            ValueError: no such folder or hub id, not a pipeline, damaged, of a kind that is not supported, or a size it
                cannot make.
        """
        folder = located(source)
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            name, _ = index["_class_name"], index["scheduler"][1]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}/model_index.json is not one that diffusers writes ({error!r}).") from error
        if not index["scheduler"][1]:
            raise ValueError(f"{folder} cannot be loaded: it lacks its scheduler")
        if not isinstance(name, str) or name not in FAMILIES:
            raise ValueError(f"{folder} holds a {name}; supported: {', '.join(FAMILIES)}.")
        try:
            return cls.from_pipeline(opened(folder, index), name, size, index.get("id2label"))
        except (OSError, ValueError, AttributeError, RuntimeError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder} cannot be loaded: {reason}") from error

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, name: str, size: tuple[int, int] | None = None, id2label: dict[str, str] | None = None
    ) -> "Prior":
        """The prior a pipeline's parts make.

        Args:
            pipeline: what has them as attributes.
            name: of its class.
            size: see `from_pretrained`.
            id2label: number → names of the classes, by commas.

        Raises:
            ValueError: a prior that is not supported.
        """
        family = FAMILIES[name].load(pipeline, size)
        names = {
            synonym.strip(): int(number) for number, text in (id2label or {}).items() for synonym in text.split(",")
        }
        names |= {str(i): i for i in range(family.classes or 0)}
        denoiser = denoiser_of(family, pipeline.scheduler)
        return cls(denoiser, family.classes, names, family.null, family.codec, family.text, name)

    def with_prompts(self, prompts: Sequence[str], guidance: float | None = None, negative: str = "") -> "Prior":
        """The prior of numbered prompts, of a model that is given text.

        Args:
            prompts: distinct; the classes of the condition `c`.
            guidance: of classifier-free guidance, 1 for none; None for the pipeline's default.
            negative: what the guidance leads away from.

        Raises:
            ValueError: it is given no text, or prompts that are not so.
        """
        if self.text is None:
            raise ValueError("this prior is given no text. Leave the prompts out.")
        if not prompts or len(set(prompts)) < len(prompts):
            raise ValueError("prompts must be distinct, and one at least.")
        call = Prompted(self.text, self.text.guidance if guidance is None else guidance, negative)
        call.add(prompts)
        names = {prompt: i for i, prompt in enumerate(prompts)}
        return replace(self, denoiser=self.denoiser.with_call(call), classes=len(prompts), names=names)

    def number_of(self, name: str) -> int:
        """The class of a name, or of a prompt, which is encoded if it is a new one.

        Raises:
            ValueError: the prior, which is given no text, has no class of that name.
        """
        if name not in self.names and self.text is None:
            some = ", ".join(list(self.names)[:10])
            raise ValueError(f"must be one of the prior's {self.classes} classes ({some} …), got {name!r}.")
        if name not in self.names:
            self.denoiser.call.add([name])
            self.names[name] = self.classes
            self.classes += 1
        return self.names[name]

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

        return replace(self, denoiser=conditional.with_call(call), classes=None, names={}, null=None)


def open_prior(name: str, size: tuple[int, int] | None = None) -> Prior:
    """The embedded prior by its name, else a pipeline's folder or hub id."""
    return Prior.from_pretrained(DIGITS if name == EMBEDDED else name, size)
