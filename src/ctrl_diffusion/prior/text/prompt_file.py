"""Read the prompts of a file, and say what of them is left out or not read."""

import unicodedata
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .encoders import TextEncoder

BOM = b"\xef\xbb\xbf"


class PromptFile(NamedTuple):
    """Hold what was read of a file of prompts."""

    prompts: list[str]  # different ones, in order
    lines: Sequence[int]  # of each prompt, from 1
    about: str  # what was read, in one line


def read_prompt_file(path: Path) -> PromptFile:
    """Read the prompts of a file, one a line, in UTF-8; blank lines and doubles are left out and counted.

    Lines are equal if they are without space around, in Unicode's normal form NFC; the first is taken as it is written.
    Raises ValueError if the file cannot be read, a line is not UTF-8, or there are no prompts.
    """
    try:
        data = path.read_bytes().removeprefix(BOM)
    except OSError as error:
        raise ValueError(f"{path} is no file of prompts, one a line: {error.strerror or error}.") from error
    try:
        texts = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = len((data[: error.start].decode("utf-8") + "x").splitlines())
        wrong = f"line {line} is not UTF-8 ({error.reason})"
        raise ValueError(f"{path} is no file of prompts, one a line: {wrong}. Save it as UTF-8.") from error
    known, prompts, lines, blank = set(), [], array("L"), 0
    for line, text in enumerate(map(str.strip, texts), start=1):
        if not text:
            blank += 1
        elif (form := unicodedata.normalize("NFC", text)) not in known:
            known.add(form)
            prompts.append(text)
            lines.append(line)
    if not prompts:
        raise ValueError(f"{path} has no prompts. Write one a line.")
    double = len(texts) - blank - len(prompts)
    left_out = [f"{count:,} {what}" for count, what in ((blank, "blank"), (double, "double")) if count]
    about = f"{path.name}: {len(prompts):,} prompt{'s' * (len(prompts) > 1)}"
    if left_out:
        about += f"; {', '.join(left_out)} line{'s' * ((double or blank) > 1)} left out"
    return PromptFile(prompts, lines, about)


def check_lines(prompts: Sequence[str]) -> None:
    """Refuse (ValueError) prompts that a file of them, one a line, would not give back."""
    forms = Counter(unicodedata.normalize("NFC", prompt) for prompt in prompts)
    for prompt in prompts:
        if prompt.splitlines() != [prompt.strip()] or forms[unicodedata.normalize("NFC", prompt)] > 1:
            what = "occurs twice" if prompt.splitlines() == [prompt.strip()] else "is no line without space around it"
            raise ValueError(f"prompts: {prompt[:60]!r} {what}. More than a few are kept one a line: mend it.")


def beyond_windows(
    encoders: Mapping[str, TextEncoder], prompts: Sequence[str], lines: Sequence[int] | None = None
) -> list[str]:
    """Say how many prompts are longer than text encoders read: a line for each window that some exceed.

    `lines` are the prompts' in their file; without, they are counted from 1. Prompts are cut into tokens a batch at a
    time: some seconds for 100,000.
    """
    said = []
    windows = sorted({encoder.window for encoder in encoders.values()})
    for window in windows:
        names = [name for name, encoder in encoders.items() if encoder.window == window]
        beyond: set[int] = set()
        for name in names:
            lengths = enumerate(encoders[name].lengths(prompts))
            beyond |= {number for number, length in lengths if length > window}
        if beyond:
            first = f"line {lines[min(beyond)]}" if lines else f"prompt {min(beyond) + 1}"
            longer = f"{len(beyond):,} prompt{'s are' if len(beyond) > 1 else ' is'} longer than"
            whose = f"the text encoder's {window} tokens; what is beyond is not read"
            if len(windows) > 1:  # another encoder may read on
                whose = f"the {window} tokens of {' and '.join(names)}; what is beyond is not read there"
            said.append(f"{longer} {whose} (first: {first})")
    return said
