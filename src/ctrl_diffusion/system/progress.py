"""Report progress: a long job opens a phase and advances it; the caller decides how to show it."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}

Advance = Callable[..., None]  # (n=1, note="")
Phase = Callable[[str, int], Advance]  # (what, total)


def ignore(line: str) -> None:
    """Print nothing."""


def silent(what: str, total: int) -> Advance:
    """Open a phase that shows nothing."""
    return lambda n=1, note="": None


@dataclass(frozen=True)
class JobOptions:
    """Hold the options of a job beside its settings; only `quick` changes results."""

    phase: Phase = silent  # shows progress
    trust: bool = False  # run code that files name
    overwrite: bool = False  # replace what an earlier job of the kind wrote
    quick: bool = False  # train a fraction, as a smoke test
    command: str | None = None  # what the user typed, for the report; None for one of the same effect
    say: Callable[[str], None] = ignore  # prints a line on what was understood, which is no warning


DEFAULT = JobOptions()


def delayed(phase: Phase, what: str, total: int, seconds: float = 2.0) -> Advance:
    """Open a phase only once its work has taken `seconds`: short work and early errors need no bar."""
    begin, done, advance = time.monotonic(), 0, None

    def step(n: int = 1, note: str = "") -> None:
        nonlocal done, advance
        done += n
        if advance is None and time.monotonic() - begin > seconds:
            advance, n = phase(what, total), done
        if advance is not None:
            advance(n, note)

    return step


class Interrupted(Exception):
    """Signal that a job was interrupted; the message says how to go on."""


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record under a name how many seconds the block inside took."""
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin


def seconds_in(text: str) -> float:
    """Read a time such as 90s, 30m or 1h30m; raise ValueError for another text."""
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip())
    parts = match.groups() if match else ()
    try:
        seconds = sum([float(n) * unit for n, unit in zip(parts, UNITS.values(), strict=False) if n], start=0.0)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{text!r} is no time. Give one such as 90s, 30m, 1h or 1h30m.")
    return seconds
