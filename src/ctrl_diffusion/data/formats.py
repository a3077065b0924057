"""Read one format each, strictly: CSV, JSON lines, and whatever the library `datasets` holds."""

import csv
import json
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from ..system.files import one_line
from .names import normal
from .tables import Fault, Table, checked_header, image_column, path_inside

Rows = tuple[list[str], list[dict[str, Any]], dict[int, Fault]]  # the columns, the rows, and what is wrong with which
NUL = "\ufdd0"  # stands for \0, which the csv module of Python 3.10 refuses; no text has it, by Unicode's own rule
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def read_text_table(path: Path, image: str | None) -> Table:
    """Read a CSV or JSON-lines file in UTF-8, whose paths are relative to its folder; `image` is their column."""
    reader = read_jsonl if path.suffix.lower() == ".jsonl" else read_csv
    notes: list[str] = []
    doubts: list[str] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            columns, rows, faults = reader(file, path, notes, doubts)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Save it as UTF-8.") from error
    if len(rows) == len(faults):
        if faults:
            raise ValueError(f"{path} row 1: {faults[0][1]}.")
        raise ValueError(f"{path} has no rows. Write one line per image.")
    good = [row for i, row in enumerate(rows) if i not in faults]

    def has_files(column: str) -> bool:
        names = (row.get(column) for row in good)
        return all(isinstance(name, str) and name.strip() and (path.parent / name.strip()).is_file() for name in names)

    files = image_column(str(path), columns, image, has_files=has_files)

    def file_of(i: int) -> tuple[Path, str]:
        name = rows[i].get(files)
        if not isinstance(name, (str, type(None))):
            raise ValueError(f"{files} must be a path, got {str(name)[:60]}")
        return path_inside(path.parent, name := (name or "").strip()), name

    def values(column: str) -> Iterable[Any]:
        for row in rows:
            value = row.get(column)
            broken = reader is read_csv and "\n" in (value or "").strip()
            yield ValueError("it holds a line break; is a quote open across lines") if broken else value

    return Table(
        str(path), columns, values, file_of, len(rows), faults,
        [f"images in the column {files}", *notes], doubts,
    )  # fmt: skip


def read_csv(file: TextIO, path: Path, notes: list[str], doubts: list[str]) -> Rows:
    """Read the columns and rows of a CSV file, and the faults of rows of another length than the header's.

    Its separator is the comma, or the semicolon or tab if the header has no comma and only one of these. Raises
    ValueError if quotes are wrong, since nobody can say where a row ends then.
    """
    lines = (line.replace("\0", NUL) for line in file)
    opening: list[str] = []
    while not (opening and opening[-1].strip()) and (line := next(lines, None)) is not None:
        opening.append(line)
    header = "".join(opening)
    separators = [separator for separator in SEPARATORS if separator in header]
    separator = separators[0] if len(separators) == 1 else ","
    if separator != ",":
        notes.append(f"separated by {SEPARATORS[separator]}")
    reader = csv.reader(chain(opening, lines), strict=True, skipinitialspace=True, delimiter=separator)
    columns: list[str] = []
    rows: list[dict[str, str]] = []
    faults: dict[int, Fault] = {}
    begin, spread = 0, []
    try:
        for fields in ([field.replace(NUL, "\0") for field in row] for row in reader):
            lines_read, begin = (begin + 1, reader.line_num), reader.line_num
            if not any(field.strip() for field in fields):
                continue  # a blank line, or the commas a spreadsheet leaves below a table
            if not columns:
                columns = checked_header(fields, f"the header of {path}")
                continue
            if len(fields) != len(columns):
                reason = f"it has {len(fields)} fields, the header {len(columns)}. Quote a field that has commas in it"
                faults[len(rows)] = ("rows of another length", reason.replace("commas", SEPARATORS[separator]))
            elif lines_read[0] < lines_read[1]:
                spread.append((len(rows) + 1, *lines_read))
            rows.append(dict(zip(columns, fields, strict=False)))
    except csv.Error as error:
        where = f"{path} row {len(rows) + 1} (line {begin + 1})" if columns else f"the header of {path}"
        raise ValueError(f"{where} cannot be read: {error}. Is a quote in it never closed, or not doubled?") from error
    if spread:
        row, first, last = spread[0]
        doubts.append(
            f"{len(spread)} of {len(rows)} rows spread over several lines, as a quote is open at their ends (row {row} "
            f"is lines {first} to {last}). If these are rows of their own, close it."
        )
    return columns, rows, faults


def read_jsonl(file: TextIO, path: Path, *_: list[str]) -> Rows:
    """Read the columns that occur in a file with one JSON object a line, its rows, and the faults of other lines."""
    columns: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    faults: dict[int, Fault] = {}
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        row: Any = {}
        try:
            row = json.loads(line, object_pairs_hook=distinct)
            if not isinstance(row, dict):
                raise ValueError("it is a JSON array" if isinstance(row, list) else f"it is {str(row)[:60]!r}")
        except (ValueError, RecursionError) as error:
            reason = in_words(error, line)
            faults[len(rows)] = ("lines that are no JSON object", f"line {number} is no JSON object: {reason}")
            row = {}
        columns |= dict.fromkeys(row)
        rows.append(row)
    return list(columns), rows, faults


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of its pairs; refuse a key that is blank, or stands twice."""
    keys = [normal(key) for key, _ in pairs]
    if "" in keys:
        raise ValueError("a key in it is blank")
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"the key {twice!r} stands in it twice")
    return dict(zip(keys, (value for _, value in pairs), strict=True))


def in_words(error: Exception, line: str) -> str:
    """Say why a line is no JSON object, and what to do."""
    text = line.strip()
    advice = "Write one object a line, with neither brackets around nor commas between them"
    if isinstance(error, RecursionError):
        return "it is nested too deeply. Mend it or remove it"
    if text.startswith("[") or text in ("]", "],"):
        return f"it belongs to a JSON array. {advice}"
    if isinstance(error, json.JSONDecodeError):
        if error.msg == "Extra data" and text[error.pos :].strip() == ",":
            return f"a comma follows the object. {advice}"
        if error.pos >= len(text) or text in ("{", "}", "},"):
            return "the object is cut off, or spread over several lines. Write one object a line"
        return f"{error.msg} at character {error.colno}. Mend it or remove it"
    return f"{str(error)[:200]}. Mend it or remove it"


def read_dataset(dataset: Any, name: str, root: Path | None, image: str | None) -> Table:
    """Read a `datasets.Dataset`; paths in it are relative to root, or as they are in the hub's cache."""
    from datasets import ClassLabel, Image

    dataset = dataset.with_format(None)  # plain values, whatever it was saved for
    old = list(dataset.column_names)
    columns = checked_header(old, name)
    if columns != old:
        dataset = dataset.rename_columns({a: b for a, b in zip(old, columns, strict=True) if a != b})
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
    typed = [column for column in columns if holds_images(dataset.features[column])]
    images = image_column(name, columns, image, typed, partial(has_files, dataset, name, root))
    if isinstance(dataset.features[images], Image):
        dataset = dataset.cast_column(images, Image(decode=False))

    pictures = dataset.select_columns(images)

    def values(column: str) -> Iterable[Any]:
        feature = dataset.features[column]
        rows = load(lambda _: list(dataset[column]), name)
        return (class_name(feature, value) for value in rows) if isinstance(feature, ClassLabel) else rows

    def picture(i: int) -> tuple[Path | bytes, str]:
        value = pictures[i][images]
        if not isinstance(value, dict):
            value = {"bytes" if isinstance(value, bytes) else "path": value}
        path = str(value.get("path") or "its image")
        if value.get("bytes") is None and not value.get("path"):
            raise ValueError("there is none")
        if value.get("bytes") is not None:
            return value["bytes"], path
        return (Path(path) if root is None else path_inside(root, path)), path

    return Table(name, columns, values, picture, len(dataset), notes=[f"images in the column {images}"])


def class_name(feature: Any, number: int | None) -> str | ValueError | None:
    """Return the name of a ClassLabel's class, None for none (−1), the error of a number that is no class."""
    if number is None or number == -1:
        return None
    if not 0 <= number < len(feature.names):
        return ValueError(f"{number} is none of its {len(feature.names)} classes")
    return str(feature.names[number])


def holds_images(feature: Any) -> bool:
    """Return whether a feature of `datasets` is images, bytes, or {bytes, path} as images are stored."""
    from datasets import Image, Value

    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return isinstance(feature, Image) or (isinstance(feature, Value) and "binary" in feature.dtype)


def has_files(dataset: Any, name: str, root: Path | None, column: str) -> bool:
    """Return whether every value of a column is the path of a file in a folder."""
    from datasets import Value

    if root is None or dataset.features[column] not in (Value("string"), Value("large_string")):
        return False
    return all(value and (root / value).is_file() for value in load(lambda _: list(dataset[column]), name))


def load(reader: Callable[[Any], Any], source: str | Path) -> Any:
    """Read a source by the library `datasets`, without its progress bars; keep one line of its error."""
    import datasets

    datasets.disable_progress_bars()
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in its error too
    try:
        return reader(datasets)
    except Exception as error:  # its readers raise nearly anything
        cause = error.__cause__ or error
        raise ValueError(f"{source} cannot be read: {one_line(cause, 200)}") from error
    finally:
        datasets.logging.set_verbosity(before)
