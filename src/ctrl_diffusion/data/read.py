"""Read labelled images: a table of any kind becomes `LabelledImages`, or an error names the row and what is wrong."""

import re
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from ..system.files import one_line, some_of
from ..system.progress import Phase, delayed, silent
from .images import MODES, Levels, Picture, as_x, blank, is_grey, open_image, to_array
from .labelled import LabelledImages
from .labels import LabelSpace
from .names import as_text, by_key, find, in_order, is_missing, is_number, normal
from .rules import Rule, load_rule
from .sources import open_table
from .tables import Table

MOST_CLASSES, SHOWN, SHOWN_TEXT = 64, 10, 60
Numbers = Mapping[str, int]  # the class number of every name a label may have, in order


class BadRow(ValueError):
    """Refuse a row: of what kind it is, in a word or two, and why it cannot be used."""


class OtherClass(BadRow):
    """Leave out a row whose class is none of those that were asked for."""


@dataclass
class Label:
    """Describe how one label of every row is read."""

    name: str
    numbers: Numbers | None = None  # the class number of every name it may have; None takes those that occur
    scale: bool | None = None  # None leaves it to the numbers that occur
    keep: bool = False  # whether words for a missing label are classes
    rule: Rule | None = None
    selects: bool = False  # whether rows with other names are left out, not refused
    texts: list[str] = field(default_factory=list)  # of every row
    names: dict[Hashable, str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = by_key(self.numbers or ())

    def check(self, row: int) -> None:
        """Refuse a label that is missing, no number on a scale, or none of the classes; spell a class as known."""
        name, text = self.name, self.texts[row]
        if self.numbers is not None and not self.scale and (known := find(text, self.names)) is not None:
            self.texts[row] = known  # even if it is a word for a missing label
        elif not text:
            raise BadRow("missing labels", f"{name} is blank. Label it or remove the row")
        elif is_missing(text, self.keep):
            advice = "Label it, remove the row, or, if the word is a class, pass --missing keep"
            raise BadRow("missing labels", f"{name} is missing ({text!r}). {advice}")
        elif self.scale and not is_number(text):
            raise BadRow("labels that are no numbers", f"{name} must be a number, got {text!r}")
        elif not self.scale and self.numbers is not None:
            if self.selects:
                what = f"rows have another {name} than the {len(self.numbers)} asked for"
                raise OtherClass(what, repr(text[:SHOWN_TEXT]))
            some = ", ".join(list(self.numbers)[:SHOWN])
            raise BadRow("unknown labels", f"{name} must be one of {some}, got {text!r}")

    def spaced(self, table: Table, rows: list[int]) -> tuple[LabelSpace, Tensor]:
        """Return what it is, and the labels of rows; refuse too many classes, and a scale of one number."""
        texts, scale = [self.texts[row] for row in rows], self.scale
        names = in_order(texts) if self.numbers is None else ()
        if scale is None and len(names) > MOST_CLASSES:
            if not_numbers := [row for row, text in zip(rows, texts, strict=True) if not is_number(text)]:
                row = not_numbers[0]
                raise ValueError(
                    f"{table.name}: {self.name} has {len(names)} different values, more than {MOST_CLASSES} classes, "
                    f"and is no scale: row {row + 1} has {self.texts[row]!r}. Cut it into a few, or mend the numbers."
                )
            scale = True
        if scale:
            space = LabelSpace(tuple(self.numbers), True) if self.numbers else LabelSpace.from_numbers(texts)
            if space.ends[0] == space.ends[1]:
                number = space.values[0]
                raise ValueError(f"{table.name}: {self.name} is {number} nearly everywhere, no scale to be controlled.")
            return space, space.places(torch.tensor([float(text) for text in texts]))
        if self.numbers is not None:
            # a class may have several names; the first is what it is called
            first = {number: text for text, number in reversed(list(self.numbers.items()))}
            space = LabelSpace(tuple(first[i] for i in range(len(first))))
            return space, torch.tensor([self.numbers[text] for text in texts])
        known = by_key(names)
        numbers = {text: names.index(find(text, known)) for text in set(texts)}
        return LabelSpace(names), torch.tensor([numbers[text] for text in texts])


@dataclass
class Tally:
    """Count what was found in the rows of a table: what to leave out, and what was changed, each with its row."""

    table: Table
    bad: list[tuple[str, str]] = field(default_factory=list)  # (kind, error)
    others: list[tuple[str, str]] = field(default_factory=list)  # (what is other, row and class)
    resized: list[tuple[int, tuple[int, int]]] = field(default_factory=list)  # (row, size)
    paged: list[tuple[int, int]] = field(default_factory=list)  # (row, pages)
    narrowed: list[tuple[int, int]] = field(default_factory=list)  # (row, largest value), colours of 16 bits
    deep: list[int] = field(default_factory=list)  # rows of more than 8 bits
    clipped: list[int] = field(default_factory=list)  # of these, rows beyond the levels

    @property
    def left_out(self) -> str:
        """How many rows are bad, by kind."""
        return ", ".join(f"{n} × {kind}" for kind, n in Counter(kind for kind, _ in self.bad).items())

    def add(self, row: int, picture: Picture, size: tuple[int, int], levels: Levels | None) -> None:
        """Count what is changed of the picture of a row that can be used."""
        if picture.image.size != size:
            self.resized.append((row + 1, picture.image.size))
        if picture.pages > 1:
            self.paged.append((row + 1, picture.pages))
        if picture.narrowed:
            colours = cast(Sequence[tuple[int, int]], picture.image.convert("RGB").getextrema())
            self.narrowed.append((row + 1, max(high for _, high in colours)))
        if picture.image.mode == "I" and levels:
            self.deep.append(row + 1)
            low, high = cast(tuple[int, int], picture.image.getextrema())
            if low < levels.black or high > levels.white:
                self.clipped.append(row + 1)

    def warn(self, size: str, levels: Levels | None) -> None:
        """Warn of what was left out or changed; refuse (ValueError) too many bad rows."""
        name, rows, texts = self.table.name, self.table.rows, []
        if self.bad:
            text = f"{len(self.bad)} of {rows} rows cannot be used ({self.left_out}; the first: {self.bad[0][1]})"
            if 2 * len(self.bad) > rows:
                raise ValueError(f"{name}: {text}. That is more than half: check the table.")
            texts.append(f"{text}. They were left out.")
        if self.others:
            what, first = self.others[0]
            text = f"{len(self.others)} of {rows} {what} (the first: {first})"
            if len(self.others) + len(self.bad) == rows:
                raise ValueError(f"{name}: {text}. No row is left: check the prompts, or the column.")
            texts.append(f"{text}: they were left out.")
        if self.resized:
            row, (width, height) = self.resized[0]
            what = f"{len(self.resized)} of {rows} images are not {size} (row {row} is {width}×{height})"
            texts.append(f"{what}: they were resized. For another crop, cut them yourself.")
        if self.paged:
            row, pages = self.paged[0]
            what = f"{len(self.paged)} of {rows} files hold several images (row {row} has {pages})"
            texts.append(f"{what}: the first of each was read.")
        if self.narrowed:
            most = max(high for _, high in self.narrowed)
            what = f"{len(self.narrowed)} of {rows} images have colours of 16 bits, the first that of row"
            what += f" {self.narrowed[0][0]}: the upper 8 of them are read"
            if most < 128:  # of 10, 12, 14 or 15 bits in 16
                raise ValueError(f"{name}: {what}, at most {most} of 255. Scale them to 8 bits yourself.")
            texts.append(f"{what}.")
        if self.deep and (levels != Levels(0, 2**16 - 1) or self.clipped):
            texts.append(f"{self.scaling(levels)}. For other limits, convert them to 8 bits yourself.")
        for text in (*self.table.doubts, *texts):
            warnings.warn(f"{name}: {text}", stacklevel=3)

    def scaling(self, levels: Levels | None) -> str:
        """Say what became black and white in deep images."""
        assert levels is not None  # of any deep image
        beyond = f"; {len(self.clipped)} go beyond, first that of row {self.clipped[0]}" if self.clipped else ""
        values = f"{levels.black} … {levels.white} became black … white in all of them"
        return f"{len(self.deep)} of {self.table.rows} images have more than 8 bits ({values}{beyond})"

    def summary(self, used: int, levels: Levels | None, labels: Mapping[str, tuple[LabelSpace, Tensor]]) -> str:
        """Say in one line what was read: rows, how the table was read, the classes with their counts."""
        others = f"{len(self.others)} of another class" if self.others else ""
        left_out = f" ({', '.join(filter(None, (self.left_out, others)))} left out)" if self.bad or self.others else ""
        parts = [f"{used} of {self.table.rows} rows{left_out}", *self.table.notes]
        parts += [self.scaling(levels)] if self.deep else []
        for name, (space, y) in labels.items():
            counts = [] if space.scale else y.bincount(minlength=space.size).tolist()
            texts = [f"{n} × {value[:40]}" for value, n in zip(space.values, counts, strict=False) if n]
            scale = f"a scale, {space.values[0]} … {space.values[-1]}" if space.scale else ""
            parts.append(f"{name}: {scale or some_of(texts, SHOWN)}")
        return f"{self.table.name}: {'; '.join(parts)}."


def read_images(
    source: str | Path, columns: Mapping[str, Numbers | None], shape: tuple[int, int, int] | None = None,
    mapping: Mapping[str, str] | None = None, scales: Mapping[str, bool] | None = None,
    tags: Mapping[str, str] | None = None, skip_bad: bool = False, phase: Phase = silent, image: str | None = None,
    keep_missing: bool = False, levels: Levels | None = None, selects: str | None = None,
) -> LabelledImages:  # fmt: skip
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
        skip_bad: leave out rows that cannot be used, with one warning; otherwise the first is an error.
        phase: reports progress.
        image: the column of the images; None finds it.
        keep_missing: take words for a missing label, such as none, for classes.
        levels: what is black and white in images of more than 8 bits; None chooses it by the whole set.
        selects: the label of which rows with other names than its `columns` are left out, with one warning.

    Raises:
        ValueError: no table, a missing column, a row that cannot be used; with skip_bad, if more than half cannot.
    """
    table, scales = open_table(source, image), scales or {}
    labels = [
        Label(name, numbers, scales.get(name), keep_missing, selects=name == selects)
        for name, numbers in columns.items()
    ]
    find_columns(table, labels, mapping or {}, tags or {})
    channels, height, width = shape or shape_of(table)
    if channels not in MODES:
        kinds = ", ".join(map(str, MODES))
        raise ValueError(f"the prior makes images of {channels} channels; image files have {kinds}.")
    size, tally = (width, height), Tally(table)
    pixels, kept, first_rows = blank(table.rows, height, width, channels), list[int](), dict[str, int]()
    advance = delayed(phase, "reading images", table.rows)
    for i in range(table.rows):
        try:
            picture = read_image(table, i, first_rows)
            if picture.image.mode == "I":
                levels = levels or find_levels(table, i, phase)
            array = to_array(
                levels.to_bytes(picture.image) if levels and picture.image.mode == "I" else picture.image,
                channels,
                size,
            )
            for label in labels:
                if label.rule:
                    view = Image.fromarray(array[..., 0] if channels == 1 else array)
                    label.texts[i] = label_by(label.rule, view, label.name)
                label.check(i)
        except OtherClass as error:
            what, text = error.args
            tally.others.append((what, f"row {i + 1}, {text}"))
        except BadRow as error:
            kind, reason = error.args
            tally.bad.append((kind, f"{table.name} row {i + 1}: {reason}"))
            if not skip_bad:
                raise ValueError(f"{tally.bad[0][1]}.") from error
        else:
            tally.add(i, picture, size, levels)
            pixels[len(kept)] = torch.from_numpy(array.copy())
            kept.append(i)
        advance()
    tally.warn(f"{width}×{height}", levels)
    spaced = {label.name: label.spaced(table, kept) for label in labels}
    return LabelledImages(
        as_x(pixels[: len(kept)]), {name: y for name, (_, y) in spaced.items()},
        {name: space.values for name, (space, _) in spaced.items()}, tally.summary(len(kept), levels, spaced),
        levels if tally.deep else None,
    )  # fmt: skip


def find_columns(table: Table, labels: list[Label], mapping: Mapping[str, str], tags: Mapping[str, str]) -> None:
    """Give every label its rule, or its texts from its column; of a label about a tag, whether the column lists it."""
    columns = {}
    for label in labels:
        source = mapping.get(label.name, label.name)
        if label.name in mapping and ":" in source:
            label.rule, label.texts = load_rule(source), [""] * table.rows
        else:
            columns[label.name] = normal(source)
    absent = [name for name, column in columns.items() if column not in table.columns]
    if table.other and len(absent) == 1 and absent[0] not in mapping and table.other not in columns.values():
        columns[absent[0]] = table.other
        table.notes.append(f"{absent[0]} was taken from {table.other}")
    table.check_columns(columns.values())
    for label in (label for label in labels if not label.rule):
        label.texts = table.texts(columns[label.name])
        if tag := tags.get(label.name):
            label.texts = texts_of_tag(table, columns[label.name], label.texts, tag)


def texts_of_tag(table: Table, column: str, texts: list[str], tag: str) -> list[str]:
    """Return yes for every row of a column that lists a tag, else no; refuse a tag that no row has."""
    rows = [{normal(text) for text in re.split("[;,|]", row)} for row in texts]
    if not any(normal(tag) in row for row in rows):
        counts = Counter(sorted(text for row in rows for text in row if text)).most_common(SHOWN)
        frequent = f"the most frequent are: {', '.join(text for text, _ in counts)}"
        raise ValueError(f"{table.name}: no row has the tag {tag!r} in {column}; {frequent}.")
    return ["yes" if normal(tag) in row else "no" for row in rows]


def shape_of(table: Table) -> tuple[int, int, int]:
    """Return (C, H, W) of a table's first image that can be read; three channels unless all are grey."""
    grey, size = True, None
    for i in range(table.rows):
        try:
            size = size or read_image(table, i, {}).image.size
            grey = grey and is_grey(table.image(i)[0])
        except Exception:  # reported when the row is read
            continue
    return (1 if grey else 3, *(size or (1, 1))[::-1])


def find_levels(table: Table, row: int, phase: Phase) -> Levels:
    """Choose the levels of all images of more than 8 bits from a row on, the first that has one."""
    extremes: list[int] = []
    advance = delayed(phase, "measuring images", table.rows - row)
    for i in range(row, table.rows):
        advance()
        try:
            image = read_image(table, i, {}).image
        except BadRow:  # reported when the row is read
            continue
        extremes += cast(tuple[int, int], image.getextrema()) if image.mode == "I" else ()
    return Levels.of_extremes(min(extremes), max(extremes))


def read_image(table: Table, row: int, first_rows: dict[str, int]) -> Picture:
    """Open the image of a row; `first_rows` has the row of every path so far, and is given this one's."""
    if row in table.faults:
        raise BadRow(*table.faults[row])
    name = "its image"
    try:
        file, path = table.image(row)
        name = repr(path)
        picture = open_image(file)
    except Exception as error:  # also of a table that is damaged at this row
        reason = one_line(error, 300)
        raise BadRow("unreadable images", f"cannot read {name} ({reason}). Mend it or remove the row") from error
    if isinstance(file, Path):
        if before := first_rows.get(str(file)):
            text = f"{name} is in row {before} too and might stand in two parts of a split. Keep one"
            raise BadRow("repeated images", text)
        first_rows[str(file)] = row + 1
    return picture


def label_by(rule: Rule, image: Image.Image, name: str) -> str:
    """Return the label a rule gives an image, as text; refuse a rule that fails or gives none."""
    try:
        label = rule(image)
    except Exception as error:  # the user's own code
        raise BadRow("rules that failed", f"the rule failed on it: {type(error).__name__}: {error}") from error
    try:
        text = as_text(label)
    except ValueError as error:
        raise BadRow("rules that failed", f"the rule must return a text or a number, got {error}") from error
    if not text:
        raise BadRow("missing labels", f"{name} is missing: the rule returned {label!r}")
    return text
