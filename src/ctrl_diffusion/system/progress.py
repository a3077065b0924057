"""How a long job tells what it is doing: it opens a phase and advances it; who watches is the caller's business."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]  # (n=1, note="")
Phase = Callable[[str, int], Advance]  # (what, total)


def silent(what: str, total: int) -> Advance:
    """A phase nobody watches."""
    return lambda n=1, note="": None


def patient(phase: Phase, what: str, total: int, seconds: float = 2.0) -> Advance:
    """A phase that opens once it has taken so long: what is over at once needs no bar, nor a mistake found early."""
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
    """A job was asked to stop, and what it needs to go on is saved; the message says how to."""


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long what is done inside took."""
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
