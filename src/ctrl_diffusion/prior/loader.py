"""Load a pipeline folder of diffusers, or say in one line why not."""

import inspect
import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers

from .families import FAMILIES
from .parts import load_part, one_line, quiet, refusing
from .source import is_here

NO_PICKLE = {"use_safetensors": True}  # a pickle can run any code
VARIANTS = ("fp16", "bf16", "non_ema")  # what is asked of the hub where no plain weights are
NOT_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


def find_pipeline(source: str | Path) -> Path:
    """Return a pipeline's folder, downloaded from the hub if `source` is no path but OWNER/NAME; refuse any other."""
    if is_here(source):
        return Path(source)
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
