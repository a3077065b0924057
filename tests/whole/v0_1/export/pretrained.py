"""The border to diffusers: a pipeline folder becomes a `Prior`; one small file per family."""

import inspect
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import diffusers
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from torch import Tensor, nn

from .denoise import ControlSite, Network, NetworkDenoiser, Prediction
from .schedule import RectifiedFlow, VariancePreserving
from .latents import Codec
from .text import Prompted, TextFamily

# the pipelines that are known, and the file that knows them
FAMILIES = {
    "DDPMPipeline": "unet",
    "DDIMPipeline": "unet",
    "DiTPipeline": "dit",
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "FluxPipeline": "flux",
}
PARTS_ALONE = {"unet": "unet", "dit": "transformer"}  # and their network; the pipeline itself takes seconds to import
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NO_PICKLE = {"use_safetensors": True}  # which could run any code
# parts of a pipeline
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
NEEDED = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


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
        codec: the autoencoder of a latent model.
        text: of a model that is given prompts.
        tokens: of one x of a flow, on which its shift may depend; 0 of others.
    """

    network: nn.Module
    call: Network
    shape: tuple[int, int, int]
    site: ControlSite
    classes: int | None
    null: int | None = None
    codec: Codec | None = None
    text: TextFamily | None = None
    tokens: int = 0


@dataclass
class Prior:
    """A pre-trained model.

    Args:
        denoiser: E[x_0 | x_t, c], its schedule and the shape (C, H, W) of x.
        classes: number of classes of the condition, None if unconditional; prompts are classes too.
        names: every name a class is known by → its number; the number itself is one, unless they are prompts.
        null: the class that stands for none, None if the network was not trained with one.
        codec: the autoencoder of a latent model, None if x are the images.
        text: of a model that is given prompts.
        pipeline: the name of its pipeline.
    """

    denoiser: NetworkDenoiser
    classes: int | None
    names: dict[str, int]
    null: int | None = None
    codec: Codec | None = None
    text: TextFamily | None = None
    pipeline: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name of every class, in order: the first it is known by, else its number."""
        called = {number: name for name, number in reversed(self.names.items())}
        return tuple(called[i] for i in range(self.classes or 0))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images, which for a latent model are not the shape of x."""
        return self.codec.image_shape if self.codec else self.denoiser.shape

    def decode(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) of x (B, *), differentiable; x themselves unless it is a latent model."""
        return self.codec.decode(x) if self.codec else x

    def encode(self, images: Tensor) -> Tensor:
        """x (B, *) of images (B, C, H, W), where these are."""
        return self.codec.encode(images.to(self.denoiser.device)).to(images.device) if self.codec else images

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
        self.denoiser = self.denoiser.at(PRECISIONS[precision])
        if tiling and self.codec:
            self.codec.vae.enable_tiling()
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
            return cls.of_pipeline(opened(folder, index), name, size, index.get("id2label"))
        except (OSError, ValueError, AttributeError, RuntimeError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{folder} cannot be loaded: {reason}") from error

    @classmethod
    def of_pipeline(
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
        # one import per family, only when asked
        family = import_module(f".{FAMILIES[name]}", __package__).load(pipeline, size)
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
        return replace(self, denoiser=self.denoiser.called(call), classes=len(prompts), names=names)

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

        return replace(self, denoiser=conditional.called(call), classes=None, names={}, null=None)


def located(source: str | Path) -> Path:
    """The folder of a pipeline, which may have to come from the hub.

    Raises:
        ValueError: there is none.
    """
    folder = Path(source)
    if folder.exists() or not named_like_hub(str(source)):
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no pipeline folder of diffusers: it has no model_index.json.")
        return folder
    try:
        with quiet():
            return Path(diffusers.DiffusionPipeline.download(str(source), **NO_PICKLE))
    except Exception as error:  # gated, absent, no network: the hub's client has an exception for each
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} is no folder here, and the hub does not give it: {reason}") from error


def part_of(folder: Path, name: str) -> Path:
    """Where a part of a pipeline is: in a folder of its own, or as in early pipelines beside the index."""
    return folder / name if (folder / name).is_dir() else folder


def named_like_hub(name: str) -> bool:
    """Whether a name could be OWNER/NAME on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers and transformers draw no bars and print no advice."""
    from transformers import logging  # a second of import that pixel models do without

    libraries = diffusers.utils.logging, logging
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # about fields of old configs, which still mean what they did
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, (level, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def opened(folder: Path, index: dict[str, Any]) -> Any:
    """A pipeline in float32 on the CPU: its parts, or with text the pipeline itself, which encodes prompts."""
    if network := PARTS_ALONE.get(FAMILIES[index["_class_name"]]):
        parts = {name: part for name, part in index.items() if isinstance(part, list) and part[0] == "diffusers"}
        if network not in parts:
            raise ValueError(f"it lacks its {network}")
        kinds = {name: getattr(diffusers, kind) for name, (_, kind) in parts.items()}
        return SimpleNamespace(
            **{
                name: kind.from_pretrained(
                    part_of(folder, name), **(NO_PICKLE if issubclass(kind, diffusers.ModelMixin) else {})
                )
                for name, kind in kinds.items()
            }
        )
    pipeline = getattr(diffusers, index["_class_name"])
    # a part that its authors left out stands as [null, null], or not at all; a flag left out has its default
    absent = {
        name: None
        for name, parameter in inspect.signature(pipeline).parameters.items()
        if name in NOT_NEEDED
        or index.get(name) == [None, None]
        or (index.get(name) is None and parameter.default is parameter.empty)
    }
    if missing := [name for name in NEEDED if name in absent]:
        raise ValueError(f"it lacks its {' and '.join(missing)}")
    with quiet():
        # said, since transformers would keep what half precision a file has
        return pipeline.from_pretrained(folder, torch_dtype=torch.float32, **NO_PICKLE, **absent)


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
        return NetworkDenoiser(family.network, family.call, schedule, "flow", family.shape, None, family.site)
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
        family.network, family.call, schedule, config.prediction_type, family.shape, clip, family.site
    )
