"""Read labelled images: a table of any kind becomes `LabelledImages`, or an error names the row and what is wrong."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..system.progress import Phase, delayed, silent
from .images import MODES, as_x, blank, is_grey, open_image, to_array
from .labelled import LabelledImages
from .labels import LabelSpace, is_number
from .rules import Rule, load_rule
from .tables import Table, open_table

MOST_CLASSES = 64
Numbers = Mapping[str, int]  # the class number of every name a label may have, in order


def in_order(texts: Iterable[str]) -> tuple[str, ...]:
    """Sort distinct labels: as numbers if all are, else as text."""
    distinct = set(texts)
    try:
        return tuple(sorted(distinct, key=float))
    except ValueError:
        return tuple(sorted(distinct))


class BadRow(ValueError):
    """Refuse a row: of what kind it is, in a word or two, and why it cannot be used."""


def read_images(
    source: str | Path, columns: Mapping[str, Numbers | None], shape: tuple[int, int, int] | None = None,
    mapping: Mapping[str, str] | None = None, scales: Mapping[str, bool] | None = None,
    tags: Mapping[str, str] | None = None, skip_bad: bool = False, phase: Phase = silent,
) -> LabelledImages:  # fmt: skip
    """Read labelled images.

    Args:
        source: a folder, a table or a dataset on the hub (`tables`).
        columns: labels to read, each with the class number of every name it may hold, in order; None takes the names
            that occur.
        shape: (C, H, W) the prior makes; images of another size are resized (bicubic) with one warning. None takes the
            images as they are, of the first one's size, in colour unless all are grey.
        mapping: the column a label is in, if it is called otherwise, or MODULE:FUNCTION, a rule (`rules`).
        scales: whether a label is a place on a scale; left out, numbers of more than MOST_CLASSES values are.
        tags: the tag a label is about, "yes" where it stands in the column, "no" where it does not.
        skip_bad: leave out rows that cannot be used, with one warning; otherwise the first is an error.
        phase: reports progress.

    Raises:
        ValueError: no table, a missing column, a row that cannot be used; with skip_bad, if more than half cannot.
    """
    table, mapping, scales = open_table(source), mapping or {}, scales or {}
    rules = {name: load_rule(text) for name, text in mapping.items() if ":" in text}
    texts = read_texts(table, {name: mapping.get(name, name) for name in columns if name not in rules}, tags or {})
    texts |= {name: [""] * table.rows for name in rules}
    channels, height, width = shape or shape_of(table)
    if channels not in MODES:
        kinds = ", ".join(map(str, MODES))
        raise ValueError(f"the prior makes images of {channels} channels; image files have {kinds}.")
    pixels, kept, resized, bad, first_rows = blank(table.rows, height, width, channels), [], [], [], {}
    advance = delayed(phase, "reading images", table.rows)
    for i in range(table.rows):
        try:
            image = read_image(table, i, first_rows)
            array = to_array(image, channels, (width, height))
            for name, rule in rules.items():
                texts[name][i] = label_by(rule, Image.fromarray(array[..., 0] if channels == 1 else array))
            for name, numbers in columns.items():
                check_label(name, texts[name][i], numbers, scales.get(name))
        except BadRow as error:
            kind, reason = error.args
            bad.append((kind, f"{table.name} row {i + 1}: {reason}"))
            if not skip_bad:
                raise ValueError(f"{bad[0][1]}.") from error
        else:
            if image.size != (width, height):
                resized.append((i + 1, image.size))
            pixels[len(kept)] = torch.from_numpy(array.copy())
            kept.append(i)
        advance()
    warn_of_rows(table, bad, resized, f"{width}×{height}")
    labels, values = {}, {}
    for name, numbers in columns.items():
        space, labels[name] = to_labels(table, name, [texts[name][i] for i in kept], numbers, scales.get(name))
        values[name] = space.values
    return LabelledImages(as_x(pixels[: len(kept)]), labels, values)


def read_texts(table: Table, columns: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, list[str]]:
    """Read every row's text of each label from its column; of a label about a tag, whether the column lists the tag."""
    table.check_columns(columns.values())
    texts = {name: table.texts(column) for name, column in columns.items()}
    for name, tag in tags.items():
        rows = [{text.strip() for text in re.split("[;,|]", row)} for row in texts[name]]
        if not any(tag in row for row in rows):
            counts = Counter(sorted(text for row in rows for text in row if text)).most_common(10)
            frequent = f"the most frequent are: {', '.join(text for text, _ in counts)}"
            raise ValueError(f"{table.name}: no row has the tag {tag!r} in {columns[name]}; {frequent}.")
        texts[name] = ["yes" if tag in row else "no" for row in rows]
    return texts


def shape_of(table: Table) -> tuple[int, int, int]:
    """Return (C, H, W) of a table's first image that can be read; three channels unless all are grey."""
    grey, size = True, None
    for i in range(table.rows):
        try:
            size = size or read_image(table, i, {}).size
            grey = grey and is_grey(table.image(i)[0])
        except (ValueError, OSError):  # reported when the row is read
            continue
    return (1 if grey else 3, *(size or (1, 1))[::-1])


def read_image(table: Table, row: int, first_rows: dict[str, int]) -> Image.Image:
    """Open the image of a row; `first_rows` has the row of every path so far, and is given this one's."""
    name = "its image"
    try:
        file, path = table.image(row)
        name = repr(path)
        image = open_image(file)
    except ValueError as error:
        raise BadRow("unreadable images", f"cannot read {name} ({error}). Mend it or remove the row") from error
    if isinstance(file, Path):
        if before := first_rows.get(str(file)):
            text = f"{name} is in row {before} too and might stand in two parts of a split. Keep one"
            raise BadRow("repeated images", text)
        first_rows[str(file)] = row + 1
    return image


def label_by(rule: Rule, image: Image.Image) -> str:
    """Return the label a rule gives an image, as text; refuse a rule that fails or gives none."""
    try:
        label = rule(image)
    except Exception as error:  # the user's own code
        raise BadRow("rules that failed", f"the rule failed on it: {type(error).__name__}: {error}") from error
    if not isinstance(label, (str, int, float)) or not str(label).strip():
        raise BadRow("rules that failed", f"the rule must return a text or a number, got {label!r}")
    return str(label).strip()


def check_label(name: str, text: str, numbers: Numbers | None, scale: bool | None) -> None:
    """Refuse a label that is blank, no number on a scale, or none of the classes."""
    if not text:
        raise BadRow("blank labels", f"{name} is blank. Label it or remove the row")
    if scale and not is_number(text):
        raise BadRow("labels that are no numbers", f"{name} must be a number, got {text!r}")
    if not scale and numbers is not None and text not in numbers:
        raise BadRow("unknown labels", f"{name} must be one of {', '.join(list(numbers)[:10])}, got {text!r}")


def warn_of_rows(table: Table, bad: list[tuple[str, str]], resized: list[tuple[int, tuple]], size: str) -> None:
    """Warn of bad rows (kind, error), which were left out, and of resized rows (number, size); refuse too many bad."""
    if bad:
        counts = ", ".join(f"{n} × {kind}" for kind, n in Counter(kind for kind, _ in bad).items())
        text = f"{table.name}: {len(bad)} of {table.rows} rows cannot be used ({counts}; the first: {bad[0][1]})"
        if 2 * len(bad) > table.rows:
            raise ValueError(f"{text}. That is more than half: check the table.")
        warnings.warn(f"{text}. They were left out.", stacklevel=3)
    if resized:
        row, (width, height) = resized[0]
        warnings.warn(
            f"{table.name}: {len(resized)} of {table.rows} images are not {size} (row {row} is {width}×{height}): they "
            "were resized. For another crop, cut them yourself.",
            stacklevel=3,
        )


def to_labels(
    table: Table, name: str, texts: list[str], numbers: Numbers | None, scale: bool | None
) -> tuple[LabelSpace, Tensor]:
    """Return what a label is, and the label of every row; refuse too many classes, and a scale of one number."""
    if scale is None and numbers is None and len(set(texts)) > MOST_CLASSES:
        scale = all(map(is_number, texts))
        if not scale:
            count = f"{len(set(texts))} different values, more than {MOST_CLASSES} classes"
            raise ValueError(f"{table.name}: {name} has {count}. Cut it into a few.")
    if scale:
        space = LabelSpace(tuple(numbers), scale=True) if numbers else LabelSpace.from_numbers(texts)
        if space.ends[0] == space.ends[1]:
            raise ValueError(f"{table.name}: {name} is {space.values[0]} nearly everywhere, no scale to be controlled.")
        return space, space.places(torch.tensor([float(text) for text in texts]))
    numbers = numbers if numbers is not None else {text: i for i, text in enumerate(in_order(texts))}
    # a class may have several names; the first is what it is called
    names = {number: text for text, number in reversed(numbers.items())}
    return LabelSpace(tuple(names[i] for i in range(len(names)))), torch.tensor([numbers[text] for text in texts])
