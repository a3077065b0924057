"""Labelled offline data: x (n, C, H, W) in [−1, 1] with one column of labels for the prior's condition, if any, and one
for each control.

A label is a class, or a place on a scale (`scale`).
"""

import csv
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor

from ..system.files import write_text, writing
from .images import Images
from .labels import LabelSpace

RAREST = 10  # examples of a class, below which some part of a split would hardly see it


@dataclass
class LabelledImages:
    """n labelled examples.

    Args:
        x: (n, C, H, W) in [−1, 1].
        labels: column → (n,) class numbers, or places on a scale as floats (the condition and the controls).
        values: column → what the user calls its classes or levels, in order.
    """

    x: Tensor | Images
    labels: dict[str, Tensor]
    values: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if isinstance(self.x, Tensor) and not self.x.isfinite().all():
            row = int((~self.x.isfinite().flatten(1).all(1)).nonzero()[0])
            raise ValueError(f"image {row} holds NaN or infinite pixels. Remove it or repair it.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | np.ndarray) -> "LabelledImages":
        rows = torch.as_tensor(rows)
        x = self.x.take(rows) if isinstance(self.x, Images) else self.x[rows]
        return LabelledImages(x, {name: y[rows] for name, y in self.labels.items()}, self.values)

    @classmethod
    def from_dataset(
        cls, dataset: Sequence, names: Sequence[str], values: Mapping[str, Sequence[str]]
    ) -> "LabelledImages":
        """From a map-style torch Dataset of (x, label, …) in memory, x (C, H, W) in [−1, 1].

        Args:
            dataset: its items are x and one class number for each name.
            names: of the labels, in the items' order.
            values: what the classes of each are called, in order.

        Raises:
            ValueError: an item that is not so.
        """
        rows = [dataset[i] for i in range(len(dataset))]
        for i, (x, *labels) in enumerate(rows):
            if len(labels) == len(names) and x.shape == rows[0][0].shape:
                continue
            raise ValueError(f"item {i} is not x of one shape followed by {', '.join(names)}.")
        labels = {name: torch.tensor([int(row[1 + i]) for row in rows]) for i, name in enumerate(names)}
        for name, y in labels.items():
            if y.min() < 0 or y.max() >= len(values[name]):
                raise ValueError(
                    f"{name} must be a class 0 … {len(values[name]) - 1}, got {int(y.min())} … {int(y.max())}."
                )
        return cls(torch.stack([row[0].float() for row in rows]), labels, {n: tuple(values[n]) for n in names})

    def through(self, encode: Callable[[Tensor], Tensor]) -> "LabelledImages":
        """The same labels with what x (n, C, H, W) are encoded to, a few at a time, in the place of x."""
        x = torch.cat([encode(self.x[rows]) for rows in torch.arange(len(self)).split(16)])
        return LabelledImages(x, self.labels, self.values)

    def space(self, column: str) -> LabelSpace:
        """Return what the labels of a column are: classes, or places on a scale where they are floats."""
        return LabelSpace(self.values[column], self.labels[column].is_floating_point())

    def digests(self) -> list[bytes]:
        """A digest of every picture (n,), the same where every pixel is, whatever its file is called."""
        parts = (to_pixels(self.x[rows]) for rows in torch.arange(len(self)).split(1024))
        return [hashlib.blake2b(pixels.tobytes(), digest_size=16).digest() for part in parts for pixels in part]

    def strata(self, column: str) -> Tensor:
        """What a split is stratified by (n,): the classes, or the quarters of a scale."""
        y = self.labels[column]
        return y.argsort().argsort() * 4 // len(y) if self.space(column).scale else y

    def check_classes(self, column: str) -> None:
        """Refuse what nobody could learn from.

        Raises:
            ValueError: one class only, or a class too rare to stand in every part of a split.
        """
        values = self.values[column]
        if self.space(column).scale:
            if len(self) < 4 * RAREST:
                raise ValueError(f"{column} has {len(self)} examples. Bring at least {4 * RAREST} of a scale.")
            return
        counts = self.labels[column].bincount(minlength=len(values)).tolist()
        if len(values) < 2:
            raise ValueError(f"all {len(self)} examples have {column} = {values[0]!r}. A control needs two classes.")
        if min(counts) < RAREST:
            raise ValueError(
                f"{column} = {values[counts.index(min(counts))]!r} has {min(counts)} example(s). "
                f"Bring at least {RAREST} of every class, or leave the class out."
            )

    def split(self, column: str, shares: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0) -> list["LabelledImages"]:
        """Disjoint parts by shares of the whole, stratified by a column; the last takes the rest.

        Raises:
            ValueError: as `check_classes` does.
        """
        self.check_classes(column)
        y = self.strata(column).numpy()
        classes = len(np.unique(y))
        rest, parts = np.arange(len(self)), []
        for share in shares[:-1]:
            size = max(classes, round(share * len(self)))
            part, rest = train_test_split(rest, train_size=size, stratify=y[rest], random_state=seed)
            parts.append(self[part])
        return [*parts, self[rest]]


def to_pixels(x: Tensor) -> np.ndarray:
    """x (n, C, H, W) in [−1, 1] as bytes (n, H, W) or (n, H, W, C); values outside are clipped."""
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Write one PNG whole."""
    with writing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def write_imagefolder(folder: Path, data: LabelledImages) -> None:
    """Write the images as PNG and `metadata.csv` last, so that a folder with a table is whole."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file_name", *data.labels])
    for i, pixels in enumerate(to_pixels(data.x)):
        save_image(folder / f"{i:05d}.png", pixels)
        writer.writerow([f"{i:05d}.png", *(data.values[name][y[i]] for name, y in data.labels.items())])
    write_text(folder / "metadata.csv", table.getvalue())
