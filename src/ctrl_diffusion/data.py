"""Labelled offline data.

On disk a dataset is an imagefolder: images and a `metadata.csv` or `.jsonl` with `file_name`, the prior's condition if
any, and one column per control. In memory x is (n, C, H, W) in [−1, 1].
"""

import csv
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor

from .files import write_text, writing

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
RAREST = 10  # examples of a class, below which some part of a split would hardly see it
MOST_CLASSES = 64


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

    def check_classes(self, column: str) -> None:
        """Refuse what nobody could learn from.

        Raises:
            ValueError: one class only, or a class too rare to stand in every part of a split.
        """
        values = self.values[column]
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
        y, classes = self.labels[column].numpy(), len(self.values[column])
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


def read_table(folder: Path, columns: Iterable[str]) -> tuple[Path, list[dict[str, str]]]:
    """The rows of `metadata.csv` or `metadata.jsonl`, every value as stripped text.

    Raises:
        ValueError: no table, no rows, a line that is not JSON, a column that is missing.
    """
    table = next((folder / name for name in ("metadata.csv", "metadata.jsonl") if (folder / name).is_file()), None)
    if table is None:
        raise ValueError(
            f"{folder} has no metadata.csv or metadata.jsonl. Write one with file_name and one column per label."
        )
    rows: list[dict] = []
    with table.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows += csv.DictReader(file) if table.suffix == ".csv" else (dict(json.loads(line)) for line in file)
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{table} line {len(rows) + 1} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{table} has no rows. Write one line per image.")
    if missing := {"file_name", *columns} - set(rows[0]):
        raise ValueError(f"{table} has no column {', '.join(sorted(missing))}; it has: {', '.join(map(str, rows[0]))}.")
    wanted = ("file_name", *columns)
    return table, [{k: "" if row.get(k) is None else str(row[k]).strip() for k in wanted} for row in rows]


def in_order(texts: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in order: as numbers if all are, else as text."""
    distinct = set(texts)
    try:
        return tuple(sorted(distinct, key=float))
    except ValueError:
        return tuple(sorted(distinct))


def open_image(folder: Path, name: str, table: Path, number: int, load: bool = False) -> Image.Image:
    """The image a row of the table names; without `load` its size and mode only.

    Raises:
        ValueError: it cannot be read, or its pixels are no bytes.
    """
    try:
        with Image.open(folder / name) as image:
            if load:
                image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{table} row {number}: cannot read the image {name!r} ({error}).") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{table} row {number}: {name!r} has pixels of mode {image.mode}. Convert it to 8 bits a channel."
        )
    return image


def read_imagefolder(
    folder: str | Path, columns: dict[str, dict[str, int] | None], shape: tuple[int, int, int] | None = None
) -> LabelledImages:
    """Read an imagefolder: images and a `metadata.csv` or `metadata.jsonl` with `file_name` and one column per label.

    Args:
        folder: of the images and the table.
        columns: label columns to read, each with the class number of every name it may hold; None takes the names that
            occur, in order.
        shape: (C, H, W) the prior makes; images of another size are resized (bicubic) with one warning. None takes the
            images as they are, in colour unless all are grey.

    Raises:
        ValueError: no table, a column or an image that is missing, a label that is blank or no class.
    """
    folder = Path(folder)
    table, rows = read_table(folder, columns)
    names, labels = {}, {}
    for name, known in columns.items():
        for number, row in enumerate(rows, start=1):
            if not row[name]:
                raise ValueError(f"{table} row {number}: {name} is blank. Label it or remove the row.")
            if known is not None and row[name] not in known:
                some = ", ".join(list(known)[:10])
                raise ValueError(f"{table} row {number}: {name} must be one of {some}, got {row[name]!r}.")
        numbers = known if known is not None else {v: i for i, v in enumerate(in_order(row[name] for row in rows))}
        if known is None and len(numbers) > MOST_CLASSES:
            raise ValueError(
                f"{table}: {name} has {len(numbers)} different values, more than {MOST_CLASSES} classes. Cut it into "
                "a few."
            )
        # a class may have several names; the first is what it is called
        first = {index: text for text, index in reversed(numbers.items())}
        names[name] = tuple(first[i] for i in range(len(first)))
        labels[name] = torch.tensor([numbers[row[name]] for row in rows])
    opened = [open_image(folder, row["file_name"], table, number) for number, row in enumerate(rows, start=1)]
    if shape is None:
        grey = all(image.mode in ("1", "L") for image in opened)
        shape = (1 if grey else 3, opened[0].height, opened[0].width)
    channels, height, width = shape
    if channels not in MODES:
        raise ValueError(
            f"the prior makes images of {channels} channels; image files have {', '.join(map(str, MODES))}."
        )
    others = [image.size for image in opened if image.size != (width, height)]
    if others:
        warnings.warn(
            f"{len(others)} of {len(rows)} images are not {width}×{height} (one is {others[0][0]}×{others[0][1]}): "
            "they were resized.",
            stacklevel=2,
        )
    pixels = np.empty((len(rows), height, width, channels), np.float32)
    for number, row in enumerate(rows):
        image = open_image(folder, row["file_name"], table, number + 1, load=True).convert(MODES[channels])
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels[number] = np.asarray(image, dtype=np.float32).reshape(height, width, channels)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    return LabelledImages(x.contiguous(), labels, names)
