"""Describe a dataset of any format as one kind of table, and find the column of its images."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .names import as_text, normal

IMAGE_COLUMNS = ("file_name", "image", "path")  # the first of them has the images
OTHER_COLUMNS = (
    "img", "images", "imgs", "jpg", "jpeg", "png", "webp", "tif", "tiff", "picture", "photo", "file", "filename",
    "filepath", "file_path", "image_path", "img_path", "image_file", "image_name", "image_filename",
)  # fmt: skip
Fault = tuple[str, str]  # of what kind it is, in a word or two, and why a row cannot be used


@dataclass
class Table:
    """Describe a dataset whose images are not opened yet."""

    name: str  # what an error calls it
    columns: list[str]
    column: Callable[[str], Iterable[Any]]  # the name of a column → its value in every row, or the error of none
    image: Callable[[int], tuple[Path | bytes, str]]  # row from 0 → the path or bytes of its image, what to call it
    rows: int
    faults: dict[int, Fault] = field(default_factory=dict)  # row from 0 → why it cannot be used at all
    notes: list[str] = field(default_factory=list)  # which of several possible readings was taken
    doubts: list[str] = field(default_factory=list)  # what to warn of
    other: str | None = None  # the column that a label is in if none has its name
    cache: tempfile.TemporaryDirectory[str] | None = None  # what must live as long as the table

    def texts(self, column: str) -> list[str]:
        """Return every row's label in a column, blank where there is none; a value that is no label is a fault."""
        texts = []
        for row, value in enumerate(self.column(column)):
            try:
                if isinstance(value, ValueError):
                    raise value
                text = as_text(value)
            except ValueError as error:
                text = ""
                self.faults.setdefault(row, ("labels that are none", f"{column}: {error}. Mend it or remove the row"))
            texts.append(text)
        return texts

    def check_columns(self, names: Iterable[str]) -> None:
        """Refuse a table that lacks one of these columns."""
        if missing := ", ".join(sorted(set(names) - set(self.columns))):
            raise ValueError(f"{self.name} has no column {missing}; it has: {', '.join(self.columns)}.")


def checked_header(names: Sequence[str], where: str) -> list[str]:
    """Return the names of columns, normalised; refuse one that is blank, or stands twice."""
    columns = list(map(normal, names))
    if "" in columns:
        raise ValueError(f"{where}: column {columns.index('') + 1} has no name. Name it, or remove the column.")
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        places = " and ".join(str(i) for i, name in enumerate(columns, start=1) if name == twice)
        raise ValueError(f"{where}: {twice} is the name of columns {places}. Rename or remove one.")
    return columns


def image_column(
    table: str, columns: Sequence[str], chosen: str | None, typed: Sequence[str] = (),
    has_files: Callable[[str], bool] = lambda column: False,
) -> str:  # fmt: skip
    """Return the column that has the images: the chosen, or the one that it must be.

    That is, in this order, a column typed as images, one of IMAGE_COLUMNS, one of OTHER_COLUMNS, or one that
    `has_files` in every row. Raises ValueError if there is none, or none of them stands out.
    """
    if chosen:
        if chosen not in columns:
            raise ValueError(f"{table} has no column {chosen} for the images; it has: {', '.join(columns)}.")
        return chosen
    usual = [column for name in IMAGE_COLUMNS for column in columns if column == name]
    if len(typed) > 1 and set(typed) & set(usual):
        return next(column for column in usual if column in typed)
    others = [column for column in columns if column.lower() in OTHER_COLUMNS]
    if not typed and not usual and len(others) != 1:
        others = [column for column in others or columns if has_files(column)] or others
    candidates = typed or usual[:1] or others
    if len(candidates) == 1:
        return candidates[0]
    names, advice = " or ".join(IMAGE_COLUMNS), "Name theirs with --image COLUMN"
    if candidates:
        raise ValueError(f"{table} has several columns that may have the images: {', '.join(candidates)}. {advice}.")
    raise ValueError(f"{table} has no column {names} for the images; it has: {', '.join(columns)}. {advice}.")


def path_inside(root: Path, name: str) -> Path:
    """Return the path of a file in a folder; refuse one outside of it, or what is no file."""
    if not name:
        raise ValueError("its path is blank")
    path = Path(os.path.normpath(root.absolute() / name))
    if not path.is_relative_to(os.path.normpath(root.absolute())):
        raise ValueError(f"{name!r} lies outside the dataset's folder; move it inside")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name!r} is no file")
    return path
