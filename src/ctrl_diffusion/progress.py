"""How a long job tells what it is doing: it opens a phase and advances it; who watches is the caller's business."""

from collections.abc import Callable

Advance = Callable[..., None]  # (n=1, note="")
Phase = Callable[[str, int], Advance]  # (what, total)


def silent(what: str, total: int) -> Advance:
    """A phase nobody watches."""
    return lambda n=1, note="": None
