"""Load a pipeline folder of diffusers, or say in one line why not."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .families import FAMILIES

NO_PICKLE = {"use_safetensors": True}  # a pickle can run any code
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


def find_pipeline(source: str | Path) -> Path:
    """Return a pipeline's folder, downloaded from the hub if `source` is no path but OWNER/NAME; refuse any other."""
    folder = Path(source)
    if folder.exists() or not is_hub_id(str(source)):
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no pipeline folder of diffusers: it has no model_index.json.")
        return folder
    try:
        with quiet():
            return Path(diffusers.DiffusionPipeline.download(str(source), **NO_PICKLE))
    except Exception as error:  # gated, absent, no network: the hub's client has an exception for each
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} is no folder here, and the hub does not give it: {reason}") from error


def is_hub_id(name: str) -> bool:
    """Return whether a name could be OWNER/NAME on the hub."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return "/" in name
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and advice of diffusers and transformers inside."""
    from transformers import logging  # a second of import that pixel models do without

    libraries = diffusers.utils.logging, logging
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of fields in old configs, which keep their meaning
            yield
    finally:
        for library, (level, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def load_pipeline(folder: Path, index: dict[str, Any]) -> Any:
    """Load a pipeline in float32 on the CPU, or its parts alone where these will do; refuse one that lacks a part."""
    family = FAMILIES[index["_class_name"]]
    if family.ALONE:
        return load_parts(folder, index, family.PARTS)
    pipeline = getattr(diffusers, index["_class_name"])
    parameters = inspect.signature(pipeline).parameters
    # a part that its authors left out stands as [null, null], or not at all; a flag left out has its default
    left_out = [name for name, p in parameters.items() if index.get(name) is None and p.default is p.empty]
    left_out += [name for name in parameters if name in NOT_NEEDED or index.get(name) == [None, None]]
    absent = dict.fromkeys(left_out)
    if missing := [name for name in family.PARTS if name in absent]:
        raise ValueError(f"it lacks its {' and '.join(missing)}")
    with quiet():
        # explicit, since transformers would keep the half precision of a file
        return pipeline.from_pretrained(folder, torch_dtype=torch.float32, **NO_PICKLE, **absent)


def load_parts(folder: Path, index: dict[str, Any], needed: tuple[str, ...]) -> SimpleNamespace:
    """Load the parts of a pipeline that diffusers itself defines, without the pipeline."""
    kinds = {name: part[1] for name, part in index.items() if isinstance(part, list) and part[0] == "diffusers"}
    if missing := [name for name in needed if name not in kinds]:
        raise ValueError(f"it lacks its {' and '.join(missing)}")
    parts = {}
    for name, kind in kinds.items():
        part = getattr(diffusers, kind)
        path = folder / name if (folder / name).is_dir() else folder  # in early pipelines beside the index
        parts[name] = part.from_pretrained(path, **(NO_PICKLE if issubclass(part, diffusers.ModelMixin) else {}))
    return SimpleNamespace(**parts)
