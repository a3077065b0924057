"""Write files whole or not at all: under a temporary name that is then renamed."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:  # what reads no tensor does not wait for torch
    from torch import Tensor


def one_line(message: object, most: int | None = None) -> str:
    """Return the text of an error, or of anything else, without line breaks, cut to so many characters."""
    return " ".join(str(message).split())[:most]


def some_of(texts: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """Join texts, of many the first, and say how many more there are."""
    joined = separator.join(texts[:most])
    if len(texts) <= most:
        return joined
    return f"{joined}{' ' if separator == ', ' else separator}and {len(texts) - most} more"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
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
    with atomic(path) as temporary:
        # a path in it may hold bytes that are no text
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_tensors(path: Path, tensors: dict[str, "Tensor"], about: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole, from tensors on any device; `about` goes into its header.

    The bytes are written by Python: when the library writes, a full disk raises no OSError, only the owner may read the
    file, and a kill leaves a temporary name of its own.
    """
    from safetensors.torch import save

    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic(path) as temporary:
        temporary.write_bytes(save(on_cpu, about))


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read a safetensors file, on the CPU, by Python, whose OSError says why a file cannot be read."""
    from safetensors.torch import load

    return load(path.read_bytes())


@contextmanager
def undamaged(folder: Path, advice: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn read errors inside into one ValueError saying the folder is damaged; re-raise PermissionError and `but`."""
    try:
        yield
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, but):
            raise
        raise ValueError(f"{folder} is damaged: {one_line(error)}. {advice}") from error


def rounded(value: Any) -> Any:
    """Round every number in a JSON value to six significant digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def finite_or_none(value: Any) -> Any:
    """Replace every number in a JSON value that is not finite by None: what is not known."""
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write JSON with a fixed layout, so that equal values are equal bytes."""
    write_text(path, json.dumps(rounded(value), indent=2, allow_nan=False) + "\n")
