"""Open a pipeline folder of diffusers, or say in one line why not."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .families import FAMILIES

NO_PICKLE = {"use_safetensors": True}  # which could run any code
# parts of a pipeline
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")
NEEDED = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


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
    if network := FAMILIES[index["_class_name"]].ALONE:
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
