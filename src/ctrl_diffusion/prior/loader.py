"""Load a pipeline folder of diffusers, or say in one line why not."""

import inspect
import json
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .families import FAMILIES
from .parts import PICKLES, load_part, one_line, quiet, refusing

NO_PICKLE = {"use_safetensors": True}  # a pickle can run any code
VARIANTS = ("fp16", "bf16", "non_ema")  # what is asked of the hub where no plain weights are
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


def find_pipeline(source: str | Path) -> Path:
    """Return a pipeline's folder, downloaded from the hub if `source` is no path but OWNER/NAME; refuse any other."""
    folder = Path(source)
    if folder.exists() or not is_hub_id(str(source)):
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is no pipeline folder of diffusers: {no_pipeline(folder)}.")
        return folder
    reasons = []
    for variant in (None, *VARIANTS):
        try:
            with quiet():
                return Path(diffusers.DiffusionPipeline.download(str(source), **NO_PICKLE, variant=variant))
        except Exception as error:  # gated, absent, no network: the hub's client has an exception for each
            reasons.append(one_line(error, 200))
            if "`safetensors` weights" not in str(error):  # those of a variant may be there
                break
    raise ValueError(f"{source} is no folder here, and the hub does not give it: {reasons[0]}")


def is_hub_id(name: str) -> bool:
    """Return whether a name could be OWNER/NAME on the hub."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        return "/" in name
    return False


def no_pipeline(path: Path) -> str:
    """Say what a path is that is no pipeline folder, and what to do."""
    files = [path] if path.is_file() else sorted(path.glob("*.*"))
    names = [file.name for file in files]
    if path.name == "model_index.json" and path.is_file():
        return "it is the index of one. Name the folder it is in"
    if lora := next((name for name in names if name.startswith(("adapter_", "pytorch_lora"))), None):
        return f"{lora} is of a LoRA. Load it into its pipeline, fuse_lora() and unload_lora_weights(), and save that"
    if "config.json" in names:
        return "it has a config.json, as one part of a pipeline has. Name the folder with the model_index.json above it"
    if single := next((name for name in names if name.endswith((".safetensors", ".gguf", *PICKLES))), None):
        convert = f'StableDiffusionPipeline, say, .from_single_file("{single}").save_pretrained(FOLDER)'
        return f"{single} is a checkpoint in a single file. Write a folder once, by {convert}"
    if "modular_model_index.json" in names:
        return "it is a modular pipeline. Save its parts as one of the pipelines above with save_pretrained()"
    return "it has no model_index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a pipeline folder; refuse one of an unknown pipeline."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/model_index.json is not one that diffusers writes ({error!r}).") from error
    supported = f"supported: {', '.join(FAMILIES)}"
    if isinstance(name, list) and "base" in index:
        raise ValueError(f"{folder} was written by ctrl export. Name the {index['base']} it was made from.")
    if isinstance(name, list):
        raise ValueError(
            f"{folder} is a pipeline of its own class, {'.'.join(map(str, name))}, whose code is not run; {supported}."
        )
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{folder} holds a {name}; {supported}.")
    labels = index.get("id2label") or {}
    if not isinstance(labels, dict) or not all(key.isdecimal() and isinstance(labels[key], str) for key in labels):
        raise ValueError(f"{folder}/model_index.json: id2label must map the numbers of classes to their names.")
    return index


def load_pipeline(folder: Path, index: dict[str, Any]) -> Any:
    """Load a pipeline in float32 on the CPU, or its parts alone where these will do; refuse one that lacks a part."""
    family = FAMILIES[index["_class_name"]]
    pipeline = getattr(diffusers, index["_class_name"], None)
    parameters = {} if family.ALONE else inspect.signature(pipeline).parameters
    needed = ["scheduler", *(name for name in family.PARTS if family.ALONE or name in parameters)]
    # a part that its authors left out stands as [null, null], or not at all
    names = dict.fromkeys((*needed, *getattr(family, "OPTIONAL", ())))
    given = {name: index[name] for name in names if index.get(name) not in (None, [None, None])}
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"it lacks its {' and '.join(missing)}")
    with nullcontext() if family.ALONE else quiet():
        loaded = {name: load_part(folder, name, part) for name, part in given.items()}
    if taken := {name: variant for name, (_, variant) in loaded.items() if variant}:
        names = ", ".join(f"{variant} of its {name}" for name, variant in taken.items())
        warnings.warn(f"{folder} has no plain weights: the variants there are were taken ({names}).", stacklevel=2)
    parts = {name: part for name, (part, _) in loaded.items()}
    if family.ALONE:
        return SimpleNamespace(**parts)
    others = [name for name, p in parameters.items() if index.get(name) is None and p.default is p.empty]
    others += [name for name in parameters if name in NOT_NEEDED or index.get(name) == [None, None]]
    with refusing("its parts do not make a pipeline"), quiet():
        return pipeline.from_pretrained(folder, local_files_only=True, **{**dict.fromkeys(others), **parts})
