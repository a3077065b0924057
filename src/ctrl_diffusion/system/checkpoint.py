"""Keep the newest two states of a training on disk, each whole or absent, and verified when read.

A state is one safetensors file, with its JSON values in the header, and a JSON file with its sha256; no code is ever
loaded. The older state is kept until the newer is whole, and is used if the newer is damaged.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .files import one_line, write_json, write_tensors

KEPT = 2


class Checkpoints:
    """Write and read the states of one training in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """List the states that were written whole, oldest first: the checksum is written last."""
        return sorted(path.with_suffix(".safetensors") for path in self.folder.glob("[0-9]*.json"))

    def write(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write tensors from any device and JSON values, to the bit; then remove all states but the one before."""
        paths = self.paths()
        path = self.folder / f"{int(paths[-1].stem) + 1 if paths else 1:08d}.safetensors"
        write_tensors(path, tensors, {"about": json.dumps(about)})
        write_json(path.with_suffix(".json"), {"sha256": sha256(path)})
        for old in [*paths, path][:-KEPT]:
            remove(old)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the newest undamaged state, on the CPU, or None; remove damaged ones, but none that raises OSError."""
        for path in reversed(self.paths()):
            try:
                if sha256(path) != json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]:
                    raise ValueError("its checksum differs")
                with safe_open(path, "pt") as file:
                    about = json.loads(file.metadata()["about"])
                return load_file(path), about
            except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
                reason = one_line(error)
                warnings.warn(f"{path} is damaged ({reason}): training goes on from before it.", stacklevel=2)
                remove(path)
        return None


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def remove(path: Path) -> None:
    """Remove a state, first the checksum that makes it whole."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def pack(name: str, values: list[Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a list `name.0`, `name.1`, …"""
    return {f"{name}.{i}": value for i, value in enumerate(values)}


def unpack(name: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Return the list that was packed under a name."""
    return [tensors[f"{name}.{i}"] for i in range(sum(key.rpartition(".")[0] == name for key in tensors))]


def subset(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `name` and a dot, without that prefix."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
