"""The states of a training on disk: the newest two, each whole or not there, and known to be what was written.

A state is one safetensors file, with what is no tensor as JSON in its header, beside a JSON file with its sha256; no
code is ever loaded. The older one is kept until the newer is whole, and takes its place where that is damaged.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .files import write_json, write_tensors

KEPT = 2


class Checkpoints:
    """The states of one training.

    Args:
        folder: they are kept in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def places(self) -> list[Path]:
        """Of the states that were written whole, oldest first: the checksum is written last."""
        return sorted(place.with_suffix(".safetensors") for place in self.folder.glob("[0-9]*.json"))

    def write(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write a state and forget all but the one before it.

        Args:
            tensors: by name, anywhere.
            about: JSON values, which come back to the bit.

        Raises:
            OSError: it cannot be written; the states that are there stay.
        """
        places = self.places()
        place = self.folder / f"{int(places[-1].stem) + 1 if places else 1:08d}.safetensors"
        write_tensors(place, tensors, {"about": json.dumps(about)})
        write_json(place.with_suffix(".json"), {"sha256": sha256(place)})
        for old in [*places, place][:-KEPT]:
            forget(old)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest state that is as it was written, on the CPU; None if there is none.

        Warns:
            UserWarning: one is damaged; it is removed.

        Raises:
            OSError: one cannot be read, which does not mean that it is damaged.
        """
        for place in reversed(self.places()):
            try:
                if sha256(place) != json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))["sha256"]:
                    raise ValueError("its checksum is another")
                with safe_open(place, "pt") as file:
                    about = json.loads(file.metadata()["about"])
                return load_file(place), about
            except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                warnings.warn(f"{place} is damaged ({reason}): training goes on from before it.", stacklevel=2)
                forget(place)
        return None


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def forget(place: Path) -> None:
    """Remove a state, first what says that it is whole."""
    place.with_suffix(".json").unlink(missing_ok=True)
    place.unlink(missing_ok=True)


def numbered(name: str, values: list[Tensor]) -> dict[str, Tensor]:
    """A list of tensors by names of a state."""
    return {f"{name}.{i}": value for i, value in enumerate(values)}


def in_turn(name: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The list that was `numbered`."""
    return [tensors[f"{name}.{i}"] for i in range(sum(key.rpartition(".")[0] == name for key in tensors))]


def part_of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `name` and a dot, without it."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
