"""Read what stands for a label: a missing one, a number, or the name of a class, whatever way it is spelled."""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable
from datetime import date, time, timedelta
from decimal import Decimal
from numbers import Real
from typing import Any, cast

from ..system.files import one_line

# how tables write in any case that there is no label: the words of pandas, of SAS (.) and of ARFF (?)
MISSING = {"", "nan", "-nan", "na", "n/a", "#n/a", "#na", "<na>", "nat", "none", "null", "?", "-", "–", "—", "."}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def is_number(text: str) -> bool:
    """Return whether a text is a finite number as tables write it: 3_7, inf and digits of other scripts are none."""
    return bool(NUMBER.fullmatch(text)) and math.isfinite(float(text))


def is_missing(text: str, keep: bool = False) -> bool:
    """Return whether a text stands for no label; if words are kept as classes, only a blank does."""
    return not text if keep else text.lower() in MISSING


def normal(text: str) -> str:
    """Normalise a name to Unicode NFC with single spaces and none around: names that look equal are equal."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def as_text(value: Any) -> str:
    """Write a label as normalised text, blank if it is None or NaN; a list joined by semicolons, as in a table.

    A scalar of numpy or torch is taken for its value. Raises ValueError if it is no text, number, date or list of them.
    """
    if isinstance(value, list):
        if any(isinstance(part, list) for part in value):
            raise ValueError(f"{str(value)[:60]} is a list of lists")
        return ";".join(map(as_text, value))
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError) as error:  # an array of several
            raise ValueError(f"{one_line(value, 60)} is more than one value") from error
    if value is None:
        return ""
    if not isinstance(value, (str, Real, Decimal, date, time, timedelta)):
        raise ValueError(f"{str(value)[:60]!r} is no text or number: {type(value).__name__}")
    if value != value:
        return ""
    text = normal(str(value))
    text.encode()  # refuses half a character, as JSON may escape it
    return text


def key_of(text: str) -> Hashable:
    """Return what texts that name one class have in common: "1", "1.0" and "01" their number; other names are kept."""
    text = normal(text)
    if is_number(text):
        return int(text) if text.lstrip("+-").isdecimal() else float(text)  # long whole numbers stay distinct
    return text.lower() if text.lower() in ("true", "false") else text


def spellings(texts: Iterable[str]) -> dict[Hashable, str]:
    """Return what each class is called, by key: its most frequent spelling, of equals the shortest, then the first."""
    counts = Counter(map(normal, texts))
    order = sorted(sorted(counts, reverse=True), key=lambda text: (counts[text], -len(text)))
    return {key_of(text): text for text in order}  # the last of a key wins


def in_order(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the classes in texts: in the order of numbers if all are, else of their characters."""
    names = spellings(texts)
    if all(map(is_number, names.values())):
        return tuple(names[key] for key in sorted(cast(Iterable[float], names)))
    return tuple(sorted(names.values()))


def by_key(names: Iterable[str]) -> dict[Hashable, str]:
    """Return names by themselves and by their keys, for `find`; of names that share a key the first has it."""
    names = list(names)
    return {key_of(name): name for name in reversed(names)} | {name: name for name in names}


def find(text: str, names: dict[Hashable, str]) -> str | None:
    """Return the name, of those `by_key`, that a text means: spelled so, else of the same key; None if none is."""
    return names.get(text) or names.get(key_of(text))
