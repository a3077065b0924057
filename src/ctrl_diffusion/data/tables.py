"""Read folders, tables, saved datasets and the hub as one kind of table."""

import csv
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HUB = re.compile(r"[\w.-]+/[\w.-]+")  # what a name on the Hugging Face hub looks like
IMAGE_COLUMNS = ("file_name", "image", "path")


@dataclass
class Table:
    """Describe a dataset whose images are not opened yet."""

    name: str  # what an error calls it
    columns: list[str]
    texts: Callable[[str], list[str]]  # column → every row's label as text, blank where there is none
    image: Callable[[int], tuple[Path | bytes, str]]  # row from 0 → the path or bytes of its image, what to call it
    rows: int
    cache: tempfile.TemporaryDirectory | None = None  # what must live as long as the table

    @classmethod
    def from_file(cls, path: Path) -> "Table":
        """Read a CSV or JSON-lines file in UTF-8, every value as stripped text."""
        rows: list[dict] = []
        with path.open(newline="", encoding="utf-8-sig") as file:
            try:
                rows += csv.DictReader(file) if path.suffix == ".csv" else (dict(json.loads(line)) for line in file)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error
            except (ValueError, TypeError, csv.Error) as error:
                raise ValueError(f"{path} line {len(rows) + 1} cannot be read: {error}") from error
        if not rows:
            raise ValueError(f"{path} has no rows. Write one line per image.")
        columns = [str(name) for name in rows[0]]
        texts = {name: [as_text(row.get(name)) for row in rows] for name in columns}
        files = texts[image_column(columns, str(path))]
        return cls(
            str(path), columns, texts.__getitem__, lambda i: (path_inside(path.parent, files[i]), files[i]), len(rows)
        )

    @classmethod
    def from_dataset(cls, dataset: Any, name: str, root: Path | None) -> "Table":
        """Read a `datasets.Dataset`; paths in it are relative to root, or as they are in the hub's cache."""
        from datasets import ClassLabel, Image

        columns = list(dataset.column_names)
        if not len(dataset):
            raise ValueError(f"{name} has no rows.")
        images = image_column(columns, name)
        if isinstance(dataset.features[images], Image):
            dataset = dataset.cast_column(images, Image(decode=False))

        def texts(column: str) -> list[str]:
            feature, values = dataset.features[column], dataset[column]
            if isinstance(feature, ClassLabel):
                return ["" if value is None else feature.int2str(value) for value in values]
            return [as_text(value) for value in values]

        def image(i: int) -> tuple[Path | bytes, str]:
            value = dataset[i][images]
            if not isinstance(value, dict):
                value = {"bytes" if isinstance(value, bytes) else "path": value}
            path = str(value.get("path") or "its image")
            if value.get("bytes") is not None:
                return value["bytes"], path
            return (Path(path) if root is None else path_inside(root, path)), path

        return cls(name, columns, texts, image, len(dataset))

    def check_columns(self, names: Iterable[str]) -> None:
        """Refuse a table that lacks one of these columns."""
        if missing := ", ".join(sorted(set(names) - set(self.columns))):
            raise ValueError(f"{self.name} has no column {missing}; it has: {', '.join(self.columns)}.")


def open_table(source: str | Path) -> Table:
    """Open a dataset by its path, or its name on the hub; refuse (ValueError) what is no table of images."""
    path, name = Path(source), str(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        dataset = load(lambda datasets: datasets.load_from_disk(str(path)), path)
        if isinstance(dataset, dict):  # of splits
            if "train" not in dataset and len(dataset) > 1:
                splits = ", ".join(dataset)
                raise ValueError(f"{path} has the splits {splits} and none called train. Save the one to be used.")
            dataset = dataset.get("train") or next(iter(dataset.values()))
        return Table.from_dataset(dataset, str(path), path)
    if path.is_dir():
        file = next((path / name for name in ("metadata.csv", "metadata.jsonl") if (path / name).is_file()), None)
        if file is None:
            advice = "Write one with file_name and one column per label."
            raise ValueError(f"{path} has no metadata.csv or metadata.jsonl. {advice}")
        return Table.from_file(file)
    if path.suffix == ".parquet" and path.is_file():
        cache = tempfile.TemporaryDirectory()  # on disk: images in a table may be more than memory holds
        dataset = load(lambda datasets: datasets.Dataset.from_parquet(str(path), cache_dir=cache.name), path)
        return replace(Table.from_dataset(dataset, str(path), path.parent), cache=cache)
    if path.is_file():
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"{path} is no table: .csv, .jsonl and .parquet are read, and folders.")
        return Table.from_file(path)
    if HUB.fullmatch(name):
        subject = f"{name} is no folder or file here, and"
        dataset = load(lambda datasets: datasets.load_dataset(name, split="train"), subject)
        return Table.from_dataset(dataset, name, None)
    raise ValueError(f"there is no folder or file {source}, and it is no OWNER/NAME of a dataset on the hub.")


def load(reader: Callable[[Any], Any], source: str | Path) -> Any:
    """Read a source by the library `datasets`, without its progress bars; keep one line of its error."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return reader(datasets)
    except Exception as error:  # its readers raise nearly anything
        cause = error.__cause__ or error
        raise ValueError(f"{source} cannot be read: {' '.join(str(cause).split())[:200]}") from error


def as_text(value: Any) -> str:
    """Write a label as text, blank where there is none; a list as a table would have it, joined by semicolons."""
    if isinstance(value, list):
        return ";".join(map(as_text, value))
    return "" if value is None else str(value).strip()


def image_column(columns: list[str], name: str) -> str:
    """Return the column that has the images; refuse a table without one."""
    column = next((column for column in IMAGE_COLUMNS if column in columns), None)
    if column is None:
        names = " or ".join(IMAGE_COLUMNS)
        raise ValueError(f"{name} has no column {names} for the images; it has: {', '.join(columns)}.")
    return column


def path_inside(root: Path, name: str) -> Path:
    """Return the path of a file in a folder; refuse one outside of it."""
    path = Path(os.path.normpath(root.absolute() / name))
    if not path.is_relative_to(os.path.normpath(root.absolute())):
        raise ValueError(f"{name!r} lies outside the dataset's folder; move it inside")
    return path
