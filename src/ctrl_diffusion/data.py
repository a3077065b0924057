"""Labelled offline data, and the conditions (c, y) a control is trained and judged on.

On disk a dataset is an imagefolder: images and a `metadata.csv` with `file_name`, the prior's condition if any, and one
column per control. In memory x is (n, C, H, W) in [−1, 1].
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor

from .control import Labels
from .files import write_text, writing


@dataclass
class LabelledImages:
    """n labelled examples.

    Args:
        x: (n, C, H, W) in [−1, 1].
        labels: column → (n,) class numbers (the condition and the controls).
        values: column → what the user calls its classes, in order.
    """

    x: Tensor
    labels: dict[str, Tensor]
    values: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not self.x.isfinite().all():
            row = int((~self.x.isfinite().flatten(1).all(1)).nonzero()[0])
            raise ValueError(f"image {row} holds NaN or infinite pixels. Remove it or repair it.")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | np.ndarray) -> "LabelledImages":
        rows = torch.as_tensor(rows)
        return LabelledImages(self.x[rows], {name: y[rows] for name, y in self.labels.items()}, self.values)

    def split(self, column: str, shares: tuple[int, int] = (350, 75), seed: int = 0) -> list["LabelledImages"]:
        """Fit / calibration / held-out parts, stratified by a column; the last takes the rest.

        Raises:
            ValueError: too few examples for the shares, or a class too rare to stand in every part.
        """
        if len(self) <= sum(shares):
            raise ValueError(
                f"{len(self)} examples cannot be split into {shares[0]} + {shares[1]} and a held-out rest."
            )
        y = self.labels[column].numpy()
        rest, parts = np.arange(len(self)), []
        for share in shares:
            part, rest = train_test_split(rest, train_size=share, stratify=y[rest], random_state=seed)
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


def read_imagefolder(folder: Path, values: dict[str, tuple[str, ...]], channels: int) -> LabelledImages:
    """Read an imagefolder.

    Args:
        folder: holds `metadata.csv` and the images it names.
        values: label columns to read, each with its classes in order.
        channels: 1 (grey) or 3 (colour).

    Raises:
        ValueError: no table, a column or an image that is missing, a label that is blank or no class.
    """
    table = folder / "metadata.csv"
    if not table.is_file():
        raise ValueError(f"{folder} has no metadata.csv. Write one with file_name and one column per label.")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = {"file_name", *values} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{table} lacks the column(s) {', '.join(sorted(missing))}, or has no rows.")
    images, labels = [], {name: [] for name in values}
    for number, row in enumerate(rows, start=2):
        for name, known in values.items():
            if row[name] not in known:
                raise ValueError(f"{table} line {number}: {name} must be one of {', '.join(known)}, got {row[name]!r}.")
            labels[name].append(known.index(row[name]))
        try:
            with Image.open(folder / (row["file_name"] or "")) as image:
                images.append(np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32))
        except OSError as error:
            raise ValueError(f"{table} line {number}: cannot read the image {row['file_name']!r} ({error}).") from error
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise ValueError(f"{folder} mixes image sizes {sorted(size[:2] for size in sizes)}. Resize them to one.")
    x = torch.from_numpy(np.stack(images)).reshape(len(images), *images[0].shape[:2], channels)
    numbers = {name: torch.tensor(y) for name, y in labels.items()}
    return LabelledImages(x.permute(0, 3, 1, 2) / 127.5 - 1, numbers, values)


@dataclass
class Conditions:
    """Every pair (c, y): G conditions of the prior times K classes of the control.

    Pair p stands for condition p // K and class p % K.

    Args:
        cond: the prior's conditions by keyword, G rows each.
        control: the control's name.
        classes: K.
    """

    cond: dict[str, Tensor]
    control: str
    classes: int

    @property
    def groups(self) -> int:
        """G, the number of the prior's conditions (1 if it has none)."""
        return len(next(iter(self.cond.values()))) if self.cond else 1

    @property
    def pairs(self) -> int:
        """G · K."""
        return self.groups * self.classes

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n pairs (n,), each as often as the others but for the remainder."""
        rounds = -(-n // self.pairs)
        return torch.cat([torch.randperm(self.pairs, generator=generator) for _ in range(rounds)])[:n]

    def all(self, repeats: int) -> Tensor:
        """Every pair `repeats` times in a row: (pairs · repeats,)."""
        return torch.arange(self.pairs).repeat_interleave(repeats)

    def cond_of(self, group: Tensor) -> dict[str, Tensor]:
        """The prior's conditions for groups (B,)."""
        return {name: rows[group] for name, rows in self.cond.items()}

    def of(self, pair: Tensor) -> tuple[Labels, dict[str, Tensor]]:
        """Labels and conditions of pairs (B,)."""
        return {self.control: pair % self.classes}, self.cond_of(pair // self.classes)
