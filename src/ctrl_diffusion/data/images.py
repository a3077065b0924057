"""Read images of any file as pixels of one size, on disk if they are too many for memory."""

import io
import math
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MOST_PIXELS = 2**26  # of one file: 8192 × 8192
IN_MEMORY = 2**28  # bytes; what is larger as floats stays on disk as bytes


def open_image(file: Path | bytes) -> Image.Image:
    """Read one image, upright, as 8-bit grey, RGB or RGBA; refuse (ValueError) one unreadable, too large or of floats.

    16 bits are scaled to 8, the orientation a camera noted is applied, palettes are looked up.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is ours
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels are too many")
        with image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    if image.mode.startswith("F"):
        raise ValueError("its pixels are floats; convert it to 8 bits a channel")
    if image.mode in ("1", "L", "RGB", "RGBA"):
        return image.convert("L") if image.mode == "1" else image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def is_grey(file: Path | bytes) -> bool:
    """Return whether `open_image` would make it grey, by the file's header; raise OSError if it has none."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        return image.mode in ("1", "L") or image.mode.startswith("I")


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
        return Images(parts[0].pixels, torch.cat([part.rows for part in parts]))
    return torch.cat(list(parts))
