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
    """A dataset before its images are opened.

    Args:
        name: what an error calls it.
        columns: its columns.
        texts: column → every row's label as text, blank where there is none.
        image: row from 0 → the path or the bytes of its image, and what to call it.
        rows: how many.
        cache: what must live as long as the table.
    """

    name: str
    columns: list[str]
    texts: Callable[[str], list[str]]
    image: Callable[[int], tuple[Path | bytes, str]]
    rows: int
    cache: tempfile.TemporaryDirectory | None = None

    def check_columns(self, wanted: Iterable[str]) -> None:
        """Refuse a table that lacks columns.

        Raises:
            ValueError: those it lacks, and those it has.
        """
        if missing := set(wanted) - set(self.columns):
            raise ValueError(
                f"{self.name} has no column {', '.join(sorted(missing))}; it has: {', '.join(self.columns)}."
            )


def open_table(source: str | Path) -> Table:
    """A dataset by its path, or by its name on the hub.

    Raises:
        ValueError: there is none, or it is not as it should be.
    """
    path = Path(source)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        return of_dataset(one_split(read_with(lambda: load_from_disk(str(path)), path), path), str(path), path)
    if path.is_dir():
        table = next((path / name for name in ("metadata.csv", "metadata.jsonl") if (path / name).is_file()), None)
        if table is None:
            raise ValueError(
                f"{path} has no metadata.csv or metadata.jsonl. Write one with file_name and one column per label."
            )
        return of_rows(table)
    if path.suffix == ".parquet" and path.is_file():
        from datasets import Dataset

        cache = tempfile.TemporaryDirectory()  # on disk: images in a table may be more than memory holds
        found = read_with(lambda: Dataset.from_parquet(str(path), cache_dir=cache.name), path)
        return replace(of_dataset(found, str(path), path.parent), cache=cache)
    if path.is_file():
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"{path} is no table: .csv, .jsonl and .parquet are read, and folders.")
        return of_rows(path)
    if HUB.fullmatch(str(source)):
        from datasets import load_dataset

        found = read_with(lambda: load_dataset(str(source), split="train"), f"{source} is no folder or file here, and")
        return of_dataset(found, str(source), None)
    raise ValueError(f"there is no folder or file {source}, and it is no OWNER/NAME of a dataset on the hub.")


def read_with(reader: Callable[[], Any], source: str | Path) -> Any:
    """What `datasets` makes of a source, without its bars and its walls of text."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    try:
        return reader()
    except Exception as error:  # its readers raise nearly anything
        cause = error.__cause__ or error
        raise ValueError(f"{source} cannot be read: {' '.join(str(cause).split())[:200]}") from error


def one_split(found: Any, path: Path) -> Any:
    """A dataset, or the `train` split of several, or the only one.

    Raises:
        ValueError: several, and none is called train.
    """
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) > 1:
        raise ValueError(f"{path} has the splits {', '.join(found)} and none called train. Save the one to be used.")
    return found.get("train") or next(iter(found.values()))


def of_rows(table: Path) -> Table:
    """A CSV or JSON-lines file, every value as stripped text.

    Raises:
        ValueError: no rows, a line that is not JSON, text that is not UTF-8.
    """
    rows: list[dict] = []
    with table.open(newline="", encoding="utf-8-sig") as file:
        try:
            rows += csv.DictReader(file) if table.suffix == ".csv" else (dict(json.loads(line)) for line in file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{table} is not UTF-8: {error}. Save it as UTF-8.") from error
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{table} line {len(rows) + 1} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{table} has no rows. Write one line per image.")
    columns = [str(name) for name in rows[0]]
    of_images = image_column(columns, str(table))

    def texts(column: str) -> list[str]:
        return [as_text(row.get(column)) for row in rows]

    names = texts(of_images)
    return Table(str(table), columns, texts, lambda i: (inside(table.parent, names[i]), names[i]), len(rows))


def of_dataset(found: Any, name: str, root: Path | None) -> Table:
    """A `datasets.Dataset`; paths in it are relative to root, or as they are in the hub's cache."""
    from datasets import ClassLabel, Image

    columns = list(found.column_names)
    if not len(found):
        raise ValueError(f"{name} has no rows.")
    of_images = image_column(columns, name)
    if isinstance(found.features[of_images], Image):
        found = found.cast_column(of_images, Image(decode=False))

    def texts(column: str) -> list[str]:
        feature, values = found.features[column], found[column]
        if isinstance(feature, ClassLabel):
            return ["" if value is None else feature.int2str(value) for value in values]
        return [as_text(value) for value in values]

    def image(i: int) -> tuple[Path | bytes, str]:
        value = found[i][of_images]
        value = value if isinstance(value, dict) else {"bytes": value} if isinstance(value, bytes) else {"path": value}
        called = str(value.get("path") or "its image")
        if value.get("bytes") is not None:
            return value["bytes"], called
        return (Path(called) if root is None else inside(root, called)), called

    return Table(name, columns, texts, image, len(found))


def as_text(value: Any) -> str:
    """A label as text, blank where there is none; of a list its members, joined as a table would have them."""
    if isinstance(value, list):
        return ";".join(map(as_text, value))
    return "" if value is None else str(value).strip()


def image_column(columns: list[str], name: str) -> str:
    """The column that has the images."""
    found = next((column for column in IMAGE_COLUMNS if column in columns), None)
    if found is None:
        raise ValueError(
            f"{name} has no column {' or '.join(IMAGE_COLUMNS)} for the images; it has: {', '.join(columns)}."
        )
    return found


def inside(root: Path, name: str) -> Path:
    """The path of a file that must lie inside a folder.

    Raises:
        ValueError: it does not.
    """
    path, root = os.path.normpath(root.absolute() / name), root.absolute()
    if not Path(path).is_relative_to(os.path.normpath(root)):
        raise ValueError(f"{name!r} lies outside the dataset's folder; move it inside")
    return Path(path)
