"""Hold labelled data: x with one column of labels for the prior's condition, if any, and one for each control."""

import csv
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..system.files import atomic
from .images import Images, Levels
from .labels import LabelSpace

RAREST = 10  # fewest examples of a class: with fewer, some part of a split would have hardly any


@dataclass
class LabelledImages:
    """Hold n labelled examples: x (n, C, H, W) in [−1, 1] and, by column, labels and what the user calls their values.

    Labels (n,) are class numbers, or places on a scale as floats; values are the classes or levels, in order.
    `about` says in one line what was read, and `levels` what was black and white in images of more than 8 bits.
    `vectors` (n, F) stand for the numbers of a column of c where p̂(y | x, c) is given its embedding.
    """

    x: Tensor | Images
    labels: dict[str, Tensor]
    values: dict[str, tuple[str, ...]]
    about: str = ""
    levels: Levels | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.x, Tensor) and not self.x.isfinite().all():
            row = int((~self.x.isfinite().flatten(1).all(1)).nonzero()[0])
            raise ValueError(f"image {row} holds NaN or infinite pixels. Remove it or repair it.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | np.ndarray) -> "LabelledImages":
        rows = torch.as_tensor(rows)
        x = self.x.take(rows) if isinstance(self.x, Images) else self.x[rows]
        labels, vectors = ({name: y[rows] for name, y in part.items()} for part in (self.labels, self.vectors))
        return LabelledImages(x, labels, self.values, vectors=vectors)

    @classmethod
    def from_dataset(
        cls, dataset: Sequence[Any], names: Sequence[str], values: Mapping[str, Sequence[str]]
    ) -> "LabelledImages":
        """Read a map-style torch Dataset into memory; refuse (ValueError) other items, and labels that are no class.

        Its items are x (C, H, W) in [−1, 1] and one class number for each of `names`, in this order; `values` are what
        the classes of each are called, in order.
        """
        rows = [dataset[i] for i in range(len(dataset))]
        for i, (x, *labels) in enumerate(rows):
            if len(labels) != len(names) or x.shape != rows[0][0].shape:
                raise ValueError(f"item {i} is not x of one shape followed by {', '.join(names)}.")
        labels = {name: torch.tensor([int(row[1 + i]) for row in rows]) for i, name in enumerate(names)}
        for name, y in labels.items():
            if y.min() < 0 or y.max() >= len(values[name]):
                got = f"{int(y.min())} … {int(y.max())}"
                raise ValueError(f"{name} must be a class 0 … {len(values[name]) - 1}, got {got}.")
        return cls(torch.stack([row[0].float() for row in rows]), labels, {n: tuple(values[n]) for n in names})

    def through(self, encode: Callable[[Tensor], Tensor] | None) -> "LabelledImages":
        """Encode x (n, C, H, W), a few at a time; the labels stay. None encodes nothing."""
        if encode is None:
            return self
        x = torch.cat([encode(self.x[rows]) for rows in torch.arange(len(self)).split(16)])
        return LabelledImages(x, self.labels, self.values, vectors=self.vectors)

    def condition(self, column: str) -> Tensor:
        """Return what p̂(y | x, c) is given of a column of c: embeddings (n, F) if there are some, else numbers (n,)."""
        return self.vectors.get(column, self.labels[column])

    def space(self, column: str) -> LabelSpace:
        """Return what the labels of a column are: classes, or places on a scale where they are floats."""
        return LabelSpace(self.values[column], self.labels[column].is_floating_point())

    def digests(self) -> list[bytes]:
        """Hash the pixels of every image (n,)."""
        parts = (to_pixels(self.x[rows]) for rows in torch.arange(len(self)).split(1024))
        return [hashlib.blake2b(pixels.tobytes(), digest_size=16).digest() for part in parts for pixels in part]

    def digest_rows(self) -> Tensor:
        """Return the digests as bytes (n, 16), for a file."""
        return torch.tensor([list(digest) for digest in self.digests()], dtype=torch.uint8)

    def strata(self, column: str) -> Tensor:
        """Return what a split is stratified by (n,): the classes, or the quarters of a scale."""
        y = self.labels[column]
        return y.argsort().argsort() * 4 // len(y) if self.space(column).scale else y

    def check_classes(self, column: str) -> None:
        """Refuse (ValueError) a column of one class, or with a class too rare to be in every part of a split."""
        space = self.space(column)
        if space.scale:
            if len(self) < 4 * RAREST:
                raise ValueError(f"{column} has {len(self)} examples. Bring at least {4 * RAREST} of a scale.")
            return
        if space.size < 2:
            name = space.values[0]
            raise ValueError(f"all {len(self)} examples have {column} = {name!r}. A control needs two classes.")
        counts = self.labels[column].bincount(minlength=space.size)
        if counts.min() < RAREST:
            few = f"{column} = {space.values[counts.argmin()]!r} has {counts.min()} example(s)"
            raise ValueError(f"{few}. Bring at least {RAREST} of every class, or leave the class out.")

    def split(self, column: str, shares: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0) -> list["LabelledImages"]:
        """Split into disjoint parts by shares of the whole, stratified by a column; the last takes the rest."""
        return [self[rows] for rows in self.split_rows(column, shares, seed)]

    def split_rows(self, column: str, shares: Sequence[float], seed: int = 0) -> list[np.ndarray]:
        """Return the rows of each part of such a split."""
        from sklearn.model_selection import train_test_split

        self.check_classes(column)
        y, rest, parts = self.strata(column).numpy(), np.arange(len(self)), []
        for share in shares[:-1]:
            size = max(len(np.unique(y)), round(share * len(self)))
            part, rest = train_test_split(rest, train_size=size, stratify=y[rest], random_state=seed)
            parts.append(part)
        return [*parts, rest]


def to_pixels(x: Tensor | Images) -> np.ndarray:
    """Convert x (n, C, H, W) in [−1, 1] to bytes (n, H, W) or (n, H, W, C); values outside are clipped."""
    images = x[:] if isinstance(x, Images) else x
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Write one PNG, all of it or nothing."""
    with atomic(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def write_imagefolder(folder: Path, data: LabelledImages) -> None:
    """Write the images as PNG and then `metadata.csv`, so that a folder with a table is complete."""
    rows = [["file_name", *data.labels]]
    for i, pixels in enumerate(to_pixels(data.x)):
        save_image(folder / f"{i:05d}.png", pixels)
        rows.append([f"{i:05d}.png", *(data.values[name][y[i]] for name, y in data.labels.items())])
    with atomic(folder / "metadata.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def warn_of_copies(source: str, data: LabelledImages, judge_data: LabelledImages | None = None) -> None:
    """Warn of images that occur twice, or in the judge's data too, whatever their files are called."""
    digests = data.digests()
    first: dict[bytes, int] = {}
    copies = [(first[d], row) for row, d in enumerate(digests, start=1) if first.setdefault(d, row) != row]
    if copies:
        warnings.warn(
            f"{source}: {len(copies)} of {len(data)} images are copies of another (the first: rows {copies[0][0]} and "
            f"{copies[0][1]} of those read). In two parts of a split they make p̂ look better than it is: keep one.",
            stacklevel=2,
        )
    if judge_data and (shared := len(set(judge_data.digests()) & set(digests))):
        warnings.warn(
            f"{source}: {shared} of its images are in judge_data too. A judge that learned from the same images as p̂ "
            "is no second opinion: leave them out of one.",
            stacklevel=2,
        )
