"""Open a pre-trained model: a pipeline folder of diffusers becomes a `Prior`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chain.codec import Codec
from .families import FAMILIES
from .family import make_denoiser
from .loader import find_pipeline, load_pipeline, read_index
from .network import Call, NetworkDenoiser, check_call
from .parts import one_line, refusing
from .precision import PRECISIONS
from .scheduler import not_followed
from .source import EMBEDDED
from .text.prompted import Prompted, PromptStorage, TextFamily


@dataclass
class Prior:
    """Hold a pre-trained model."""

    denoiser: NetworkDenoiser  # E[x_0 | x_t, c], its schedule and the shape (C, H, W) of x
    classes: int | None  # of the condition; None if unconditional; prompts are classes too
    names: dict[str, int]  # every name of a class → its number, which is a name too, unless classes are prompts
    null: int | None = None  # the class that stands for none; None if the network was not trained with one
    codec: Codec = field(default_factory=Codec)  # turns x into images: a latent model's autoencoder, else the identity
    text: TextFamily | None = None  # of a model that is given prompts
    pipeline: str = ""  # the class of its pipeline
    scheduler: str = ""  # the class of its scheduler
    not_followed: dict[str, Any] = field(default_factory=dict)  # settings of the scheduler that the chain does not
    source: str = "this prior"  # its folder

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """One name of every class, in order: the first that is not its number, if any."""
        names = {number: name for name, number in reversed(self.names.items())}
        return tuple(names[i] for i in range(self.classes or 0))

    @property
    def latent(self) -> bool:
        return self.codec.latent

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images; x of a latent model has another shape."""
        return self.codec.image_shape or self.denoiser.shape

    def decode(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of x (B, *), differentiable; x itself unless it is a latent model."""
        return self.codec.decode(x)

    def encode(self, images: Tensor) -> Tensor:
        """Return x (B, *) of images (B, C, H, W), on their device."""
        return self.codec.encode(images, self.denoiser.device)

    def placed(self, device: str = "auto", precision: str = "no", tiling: bool = False) -> "Prior":
        """Move the network to a device and return this prior; the autoencoder follows when needed, text encoders stay.

        "auto" is CUDA if there is any; a device that does not exist is refused (ValueError). The precision "no" is that
        of the network's weights, "bf16" and "fp16" autocast; `tiling` decodes large images in tiles.
        """
        try:
            self.denoiser.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        except (RuntimeError, AssertionError) as error:  # torch built without it raises the latter
            reason = one_line(error, 100)
            raise ValueError(f"device: {device!r} is not available here ({reason}). Use auto.") from error
        self.denoiser.set_precision(PRECISIONS[precision])
        if tiling:
            self.codec.enable_tiling()
        return self

    @classmethod
    def from_pretrained(cls, source: str | Path, size: tuple[int, int] | None = None) -> "Prior":
        """Load a diffusers pipeline from a folder or, by OWNER/NAME, the hub; one that is given text has no class yet.

        `size` is (H, W) of the images, for families that make any; None is the size it was trained on. Raises
        ValueError if it is not found, no pipeline, damaged, not supported, or cannot make the size.
        """
        folder = find_pipeline(source)
        index = read_index(folder)
        try:
            prior = cls.from_pipeline(load_pipeline(folder, index), index["_class_name"], size, index.get("id2label"))
            if not prior.text:  # else when its first prompts are there
                c = {} if prior.classes is None else {"c": torch.zeros(2, dtype=torch.long)}
                check_call(prior.denoiser.network, prior.denoiser.call, prior.denoiser.shape, **c)
        except ValueError as error:
            raise ValueError(f"{folder} cannot be loaded: {error}") from error
        return replace(prior, source=str(folder))

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, name: str, size: tuple[int, int] | None = None, id2label: dict[str, str] | None = None
    ) -> "Prior":
        """Make a prior of an object that has a pipeline's parts, by the name of the pipeline's class.

        `id2label` maps a class's number to its names, separated by commas.
        """
        family = FAMILIES[name].load(pipeline, size)
        names = {label.strip(): int(i) for i, labels in (id2label or {}).items() for label in labels.split(",")}
        if family.classes and (beyond := [name for name, i in names.items() if i >= family.classes]):
            raise ValueError(
                f"id2label in model_index.json names {beyond[0]!r} as class {names[beyond[0]]}; its network "
                f"has {family.classes} classes, numbered from 0"
            )
        names |= {str(i): i for i in range(family.classes or 0)}
        denoiser = make_denoiser(family, pipeline.scheduler)
        denoiser.null_call = None if family.null is None else partial(call_null, family.call, family.null)
        scheduler = pipeline.scheduler
        return cls(
            denoiser, family.classes, names, family.null, family.codec, family.text, name, type(scheduler).__name__,
            not_followed(scheduler),
        )  # fmt: skip

    def with_prompts(
        self, prompts: Sequence[str], guidance: float | None = None, negative: str = "", cache: Path | None = None
    ) -> "Prior":
        """Return the prior of numbered prompts, the classes of `c`, of a model that is given text.

        Classifier-free `guidance`, 1 for none, None for the pipeline's default, leads away from the negative prompt.
        The prompts are encoded in one batch and stay in memory. With a `cache`, a folder, each is encoded when it is
        first looked up and read from files in there from then on, so that memory does not grow with their number
        (`text.encoded`). Raises ValueError if the model is given no text, or there are no prompts, or equal ones.
        """
        if self.text is None:
            raise ValueError("this prior is given no text. Leave the prompts out.")
        if not prompts or len(set(prompts)) < len(prompts):
            raise ValueError("prompts must be distinct, and at least one.")
        if cache and not self.text.encoders:
            raise ValueError(f"{self.source}: its family names no text encoders to know files by. Leave the cache out.")
        call = Prompted(self.text, self.text.guidance if guidance is None else guidance, negative)
        with refusing(f"{self.source}: its text encoders cannot encode the prompts"):
            first = call.keep(prompts, Path(cache), self.pipeline) if cache else call.add(prompts)
        rows = {name: row[[0, 0]] for name, row in first.items()}
        rows |= {"guidance": torch.zeros(2)} if self.text.distilled else {}
        try:
            if uneven := [name for name, row in call.null.items() if row.shape[1:] != rows[name].shape[1:]]:
                raise ValueError(f"its tokenizers give a prompt and no prompt different lengths ({uneven[0]})")
            check_call(self.denoiser.network, self.text.call, self.denoiser.shape, **rows)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error
        names = {prompt: i for i, prompt in enumerate(prompts)}
        denoiser = self.denoiser.with_call(call)
        denoiser.null_call = call.without_prompt if call.null else None
        return replace(self, denoiser=denoiser, classes=len(prompts), names=names)

    def number_of(self, name: str) -> int:
        """Return the class of a name, or of a prompt, which is encoded if it is new; refuse an unknown name."""
        if name not in self.names:
            if self.text is None:
                some = ", ".join(list(self.names)[:10])
                raise ValueError(f"must be one of the prior's {self.classes} classes ({some} …), got {name!r}.")
            self._prompted().add([name])
            count = self.classes or 0
            self.names[name], self.classes = count, count + 1
            self.__dict__.pop("class_names", None)  # one more now
        return self.names[name]

    def embedding_of(self, c: Tensor) -> Tensor:
        """Return a vector for each of the numbered prompts c (n,): (n, F), float32, on the CPU.

        It is the mean over all tokens of what the network is given of a prompt, padding included, as the text encoders
        made it. Raises ValueError of a prior without prompts, and of one whose text is not encoded token by token.
        """
        return self._prompted().embedding(c)

    @property
    def prompt_storage(self) -> PromptStorage:
        """How much room this prior's prompts take once all are encoded, in memory or in the files of a cache."""
        each = self._prompted().bytes_each
        count = self.classes or 0
        return PromptStorage(count, each, count * each)

    def _prompted(self) -> Prompted:
        """Return what looks prompts up; refuse a prior that has none."""
        if not isinstance(self.denoiser.call, Prompted):
            raise ValueError(f"{self.source} has no prompts. Number some with with_prompts().")
        return self.denoiser.call

    def unconditional(self) -> "Prior":
        """Return the prior p(x) of a prior p(x | c): the same network under its null class, if it has one."""
        call = self.denoiser.null_call
        if self.null is None or call is None:
            reason = "is unconditional already" if self.classes is None else "was not trained with a class for none"
            raise ValueError(f"unconditional: this prior {reason}. Leave it out.")
        return replace(self, denoiser=self.denoiser.with_call(call), classes=None, names={}, null=None)


def call_null(call: Call, null: int, x_t: Tensor, timestep: Tensor) -> Tensor:
    """Call a class-conditional network for its null class."""
    return call(x_t, timestep, c=torch.full_like(timestep, null, dtype=torch.long))


def pipeline_folder(name: str) -> Path:
    """Return the folder of an embedded prior by its name, else of a pipeline, fetched from the hub if need be."""
    return EMBEDDED.get(name) or find_pipeline(name)


def open_prior(name: str, size: tuple[int, int] | None = None) -> Prior:
    """Open an embedded prior by its name, else a pipeline's folder or hub id."""
    return Prior.from_pretrained(EMBEDDED.get(name, name), size)
