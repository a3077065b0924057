"""Read images of any file as pixels of one size, on disk if they are too many for memory."""

import io
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from ..system.files import one_line

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MOST_PIXELS = 2**26  # of one file: 8192 × 8192
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners fill of a number
SAMPLE_FORMAT, SIGNED = 339, 2  # a tag of TIFF files, and its value for what Pillow reads as if it had no sign
IN_MEMORY = 2**28  # bytes; what is larger as floats stays on disk as bytes


class Picture(NamedTuple):
    """Hold an image, of 8 bits or in the mode I of whole numbers, and how many its file has."""

    image: Image.Image
    pages: int
    narrowed: bool = False  # whether its decoder keeps the upper 8 of the 16 bits of a colour


@contextmanager
def long_texts() -> Iterator[None]:
    """Allow a PNG inside as much compressed text as text, 64 MB: programs keep a picture's history in it."""
    usual = PngImagePlugin.MAX_TEXT_CHUNK
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK = usual


@contextmanager
def muted() -> Iterator[None]:
    """Discard inside what libtiff, which knows no Python, writes to the terminal of a damaged file."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def open_image(file: Path | bytes) -> Picture:
    """Read one image, upright, as grey, RGB or RGBA of 8 bits or grey of more (mode I).

    The orientation a camera noted is applied, palettes are looked up, of several pages the first is read. Raises
    ValueError if it is unreadable, too large or of floats, whatever its decoder raises.
    """
    try:
        with warnings.catch_warnings(), long_texts():
            warnings.simplefilter("ignore")  # of what can be read all the same; too many pixels are ours to refuse
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
                if not 0 < image.width * image.height <= MOST_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels are too many")
                if image.mode == "L" and getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT) == (SIGNED,):
                    raise ValueError("its pixels are of 8 bits with a sign; convert it to 16 bits")
                pages, raw = getattr(image, "n_frames", 1), str(image.tile[:1])
                with muted() if image.format == "TIFF" and sys.stderr else nullcontext():
                    image.load()
                narrowed = ";16" in raw and not image.mode.startswith("I")
                return Picture(plain(ImageOps.exif_transpose(image), raw), pages, narrowed)
    except Exception as error:  # decoders raise anything
        text = one_line(error, 200)
        told = isinstance(error, (OSError, ValueError, SyntaxError)) and text
        raise ValueError(text if told else f"{type(error).__name__}: {text}") from error


def plain(image: Image.Image, raw: str) -> Image.Image:
    """Convert an image to grey, RGB or RGBA of 8 bits, or mode I if it is deeper; `raw` says how its file has it."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if "I;32N" in raw and values.min() < 0:  # Pillow reads unsigned numbers as signed
            raise ValueError("its pixels are of 2³¹ and more; convert it to 16 bits")
        return Image.fromarray(values.astype(np.int32))
    if image.mode.startswith("F"):
        raise ValueError("its pixels are floats; convert it to 8 bits a channel")
    if image.mode in ("1", "L", "RGB", "RGBA"):
        return image.convert("L") if image.mode == "1" else image
    image = image.convert("LA") if image.mode == "La" else image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def is_grey(file: Path | bytes) -> bool:
    """Return whether `open_image` would make it grey, by the file's header, whose faults are a ValueError."""
    try:
        with long_texts(), Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return image.mode in ("1", "L") or image.mode.startswith("I")
    except Exception as error:  # decoders raise anything
        raise ValueError(str(error)) from error


class Levels(NamedTuple):
    """Name the numbers that are black and white in every image of more than 8 bits of a set."""

    black: int
    white: int

    @classmethod
    def of_extremes(cls, lowest: int, highest: int) -> "Levels":
        """Choose them from a set's extremes: the range of the fewest usual bits that hold them, else the extremes."""
        bits = next((bits for bits in DEPTHS if lowest >= 0 and highest < 2**bits), None)
        return cls(0, 2**bits - 1) if bits else cls(lowest, highest)

    def to_bytes(self, image: Image.Image) -> Image.Image:
        """Scale an image of mode I to 8 bits; what lies outside is clipped."""
        values = np.asarray(image).astype(np.int64).clip(self.black, self.white) - self.black
        return Image.fromarray((values * 255 // max(1, self.white - self.black)).astype(np.uint8))


def to_array(image: Image.Image, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Resize to pixels (H, W, C) of 8 bits; transparency is put on white, unless there is a channel for it."""
    if image.mode == "RGBA" and channels != 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels]).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(*size[::-1], channels)


class Images:
    """Hold x (n, C, H, W) in [−1, 1] as rows of bytes (N, H, W, C); they become floats when they are indexed."""

    def __init__(self, pixels: Tensor, rows: Tensor | None = None) -> None:
        self.pixels = pixels
        self.rows = torch.arange(len(pixels)) if rows is None else rows

    @property
    def shape(self) -> torch.Size:
        height, width, channels = self.pixels.shape[1:]
        return torch.Size((len(self.rows), channels, height, width))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice | int) -> Tensor:
        return self.pixels[self.rows[rows]].movedim(-1, -3).float().div_(127.5).sub_(1).contiguous()

    def take(self, rows: Tensor) -> "Images":
        """Return some rows, still as bytes."""
        return Images(self.pixels, self.rows[rows])


def blank(*shape: int) -> Tensor:
    """Allocate bytes (n, H, W, C) in memory or, if they were too many as floats, in a temporary file."""
    if 4 * math.prod(shape) <= IN_MEMORY:
        return torch.empty(shape, dtype=torch.uint8)
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=shape))


def as_x(pixels: Tensor) -> Tensor | Images:
    """Return x of bytes (n, H, W, C): floats where they fit into memory."""
    return Images(pixels) if 4 * pixels.numel() > IN_MEMORY else Images(pixels)[:]


def joined_x(parts: Sequence[Tensor | Images]) -> Tensor | Images:
    """Concatenate parts of one set of images."""
    if isinstance(parts[0], Images):
        return Images(parts[0].pixels, torch.cat([part.rows for part in parts if isinstance(part, Images)]))
    return torch.cat([part for part in parts if isinstance(part, Tensor)])
