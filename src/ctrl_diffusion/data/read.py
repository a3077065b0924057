"""Read labelled images: a table of any kind becomes `LabelledImages`, or one line says which row is wrong and why."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..system.progress import Phase, patient, silent
from .images import MODES, as_x, blank, is_grey, open_image, to_array
from .labelled import LabelledImages
from .labels import LabelSpace, is_number
from .rules import Rule, label_by, load_rule
from .tables import Table, open_table

MOST_CLASSES = 64
Known = Mapping[str, int]


def in_order(texts: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in order: as numbers if all are, else as text."""
    distinct = set(texts)
    try:
        return tuple(sorted(distinct, key=float))
    except ValueError:
        return tuple(sorted(distinct))


class Bad(Exception):
    """A row that cannot be used, and in a word why."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(text)
        self.why = why


def read_images(
    source: str | Path,
    columns: Mapping[str, Known | None],
    shape: tuple[int, int, int] | None = None,
    mapping: Mapping[str, str] | None = None,
    scales: Mapping[str, bool] | None = None,
    tags: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    phase: Phase = silent,
) -> LabelledImages:
    """Read labelled images.

    Args:
        source: a folder, a table or a dataset on the hub (`sources`).
        columns: labels to read, each with the class number of every name it may hold, in order; None takes the names
            that occur.
        shape: (C, H, W) the prior makes; images of another size are resized (bicubic) with one warning. None takes the
            images as they are, of the first one's size, in colour unless all are grey.
        mapping: the column a label is in, if it is called otherwise, or MODULE:FUNCTION, a rule (`rules`).
        scales: whether a label is a place on a scale; left out, numbers of more than MOST_CLASSES values are.
        tags: the tag a label is about, "yes" where it stands in the column, "no" where it does not.
        skip_bad: leave out rows that cannot be used, and say how many; otherwise the first is an error.
        phase: told of progress.

    Raises:
        ValueError: no table, a column that is missing, a row that cannot be used, more than half of them.

    Warns:
        UserWarning: images were resized, or rows left out.
    """
    table, mapping, scales = open_table(source), mapping or {}, scales or {}
    rules = {name: load_rule(text) for name, text in mapping.items() if ":" in text}
    wanted = {name: mapping.get(name, name) for name in columns if name not in rules}
    table.check_columns(wanted.values())
    texts = {name: table.texts(column) for name, column in wanted.items()}
    texts |= {name: tagged(table, wanted[name], texts[name], tag) for name, tag in (tags or {}).items()}
    texts |= {name: [""] * table.rows for name in rules}
    if shape and shape[0] not in MODES:
        raise ValueError(
            f"the prior makes images of {shape[0]} channels; image files have {', '.join(map(str, MODES))}."
        )
    shape = shape or shape_of(table)
    pixels, kept, resized, bad = blank(table.rows, *shape[1:], shape[0]), [], [], []
    met: dict[str, int] = {}
    advance = patient(phase, "reading images", table.rows)
    for i in range(table.rows):
        try:
            image = opened(table, i, met)
            array = to_array(image, shape[0], shape[:0:-1])
            for name, rule in rules.items():
                texts[name][i] = ruled(rule, Image.fromarray(array[..., 0] if shape[0] == 1 else array))
            for name, known in columns.items():
                check_label(name, texts[name][i], known, scales.get(name))
            if image.size != shape[:0:-1]:
                resized.append((i + 1, image.size))
            pixels[len(kept)] = torch.from_numpy(array.copy())
            kept.append(i)
        except Bad as error:
            text = f"{table.name} row {i + 1}: {error}"
            if not skip_bad:
                raise ValueError(text + ".") from error
            bad.append((error.why, text))
        advance()
    tell(table, bad, resized, shape)
    labels, values = {}, {}
    for name, known in columns.items():
        space, labels[name] = numbered(table, name, [texts[name][i] for i in kept], known, scales.get(name))
        values[name] = space.values
    return LabelledImages(as_x(pixels[: len(kept)]), labels, values)


def shape_of(table: Table) -> tuple[int, int, int]:
    """(C, H, W) of a table's first image that can be read; three channels unless all are grey."""
    grey, size = True, None
    for i in range(table.rows):
        try:
            size = size or opened(table, i, {}).size
            grey = grey and is_grey(table.image(i)[0])
        except (Bad, ValueError, OSError):  # said when the row is read
            continue
    return (1 if grey else 3, *(size or (1, 1))[::-1])


def opened(table: Table, row: int, met: dict[str, int]) -> Image.Image:
    """The image of a row; `met` has the images before it by path."""
    name = "its image"
    try:
        file, called = table.image(row)
        name = repr(called)
        image = open_image(file)
    except ValueError as error:
        raise Bad("unreadable images", f"cannot read {name} ({error}). Mend it or remove the row") from error
    if isinstance(file, Path):
        if before := met.get(str(file)):
            raise Bad(
                "repeated images", f"{name} is in row {before} too and might stand in two parts of a split. Keep one"
            )
        met[str(file)] = row + 1
    return image


def ruled(rule: Rule, image: Image.Image) -> str:
    """What a rule says of an image."""
    try:
        return label_by(rule, image)
    except ValueError as error:
        raise Bad("rules that failed", str(error)) from error


def tagged(table: Table, column: str, texts: list[str], tag: str) -> list[str]:
    """Whether each row has a tag; a row without any has a blank column.

    Raises:
        ValueError: no row has it.
    """
    rows = [{found.strip() for found in re.split("[;,|]", text)} for text in texts]
    if not any(tag in row for row in rows):
        known = Counter(sorted(found for row in rows for found in row if found))
        some = ", ".join(found for found, _ in known.most_common(10))
        raise ValueError(f"{table.name}: no row has the tag {tag!r} in {column}; the most frequent are: {some}.")
    return ["yes" if tag in row else "no" for row in rows]


def check_label(name: str, text: str, known: Known | None, scale: bool | None) -> None:
    """Refuse a label that is blank, no number on a scale, or none of the known classes."""
    if not text:
        raise Bad("blank labels", f"{name} is blank. Label it or remove the row")
    if scale and not is_number(text):
        raise Bad("labels that are no numbers", f"{name} must be a number, got {text!r}")
    if not scale and known is not None and text not in known:
        raise Bad("unknown labels", f"{name} must be one of {', '.join(list(known)[:10])}, got {text!r}")


def tell(
    table: Table, bad: list[tuple[str, str]], resized: list[tuple[int, tuple]], shape: tuple[int, int, int]
) -> None:
    """Warn of rows that were left out or resized.

    Raises:
        ValueError: more than half of the rows cannot be used.
    """
    if bad:
        counts = ", ".join(f"{n} × {why}" for why, n in Counter(why for why, _ in bad).items())
        text = f"{table.name}: {len(bad)} of {table.rows} rows cannot be used ({counts}; the first: {bad[0][1]})"
        if 2 * len(bad) > table.rows:
            raise ValueError(f"{text}. That is more than half: check the table.")
        warnings.warn(f"{text}. They were left out.", stacklevel=3)
    if resized:
        row, size = resized[0]
        warnings.warn(
            f"{table.name}: {len(resized)} of {table.rows} images are not {shape[2]}×{shape[1]} (row {row} is "
            f"{size[0]}×{size[1]}): they were resized. For another crop, cut them yourself.",
            stacklevel=3,
        )


def numbered(
    table: Table, name: str, texts: list[str], known: Known | None, scale: bool | None
) -> tuple[LabelSpace, Tensor]:
    """Return what a label is, and the label of every row."""
    if scale is None and known is None and len(set(texts)) > MOST_CLASSES:
        scale = all(map(is_number, texts))
        if not scale:
            raise ValueError(
                f"{table.name}: {name} has {len(set(texts))} different values, more than {MOST_CLASSES} classes. Cut "
                "it into a few."
            )
    if scale:
        space = LabelSpace(tuple(known), scale=True) if known else LabelSpace.from_numbers(texts)
        if space.ends[0] == space.ends[1]:
            raise ValueError(f"{table.name}: {name} is {space.values[0]} nearly everywhere, no scale to be controlled.")
        return space, space.places(torch.tensor([float(text) for text in texts]))
    numbers = known if known is not None else {text: i for i, text in enumerate(in_order(texts))}
    # a class may have several names; the first is what it is called
    first = {index: text for text, index in reversed(numbers.items())}
    return LabelSpace(tuple(first[i] for i in range(len(first)))), torch.tensor([numbers[text] for text in texts])
