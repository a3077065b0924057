"""Files appear whole or not at all: written under a temporary name, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it on success, remove it on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole; tensors may be anywhere, `about` stands in its header.

    By Python's own write, not the library's: there a full disk is no OSError, nobody but the owner may read the file,
    and a kill leaves another temporary name.
    """
    there = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with writing(path) as temporary:
        temporary.write_bytes(save(there, about))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, on the CPU; where it cannot be read the OSError says why, as the library's does not."""
    return load(path.read_bytes())


@contextmanager
def undamaged(folder: Path, advice: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Inside, what cannot be read of a folder that was written whole is one line; errors that say more pass.

    Args:
        folder: that is read.
        advice: what to do.
        but: errors that pass, beside that a file may not be read.

    Raises:
        ValueError: it is damaged.
    """
    try:
        yield
    except (PermissionError, *but):
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {' '.join(str(error).split())}. {advice}") from error


def rounded(value: Any) -> Any:
    """Every number in a JSON value to six significant digits: more is rounding noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON with a fixed layout, so that equal values are equal bytes."""
    write_text(path, json.dumps(rounded(value), indent=2, allow_nan=False) + "\n")
