"""Draw of two runs from the same noise."""

from collections.abc import Iterator
from threading import Event
from typing import Any

from .cards import drawing_downloads, progress_html, sides_html
from .readings import certificate_sentence
from .request import Request
from .session import Drawing, Session


def comparable(first: Session, second: Session) -> None:
    """Refuse (ValueError) two runs whose noise means different things: of two priors, or of one prior in two ways."""
    if first is second:
        raise ValueError("choose two different runs to compare.")
    keys = ("prior", "unconditional", "size", "guidance", "negative_prompt")
    for key in keys:
        a, b = (getattr(session.run.config, key) for session in (first, second))
        if a != b:
            raise ValueError(
                f"{first.name} and {second.name} cannot be compared: their {key} is {a} and {b}, "
                "so that the same noise is not the same picture. Choose two runs of one prior."
            )


def draw_both(
    sessions: tuple[Session, Session], values: tuple[dict[str, Any], ...], stop: Event
) -> Iterator[list[Drawing]]:
    """Yield the drawings of two runs as they grow, the first and then the second; raises as `Session.draw` does."""
    comparable(*sessions)
    requests = [Request.checked(session.run, row) for session, row in zip(sessions, values, strict=True)]
    drawings = [Drawing(request) for request in requests]
    for i, session in enumerate(sessions):
        for drawing in session.draw(requests[i], stop):
            drawings[i] = drawing
            yield list(drawings)


def both_html(sessions: tuple[Session, Session], drawings: list[Drawing]) -> str:
    """Show what the two controls make of the same noise, and what to download of each."""
    sides, downloads = [], []
    for session, drawing in zip(sessions, drawings, strict=True):
        sides.append((f"{session.name}: {drawing.request.in_words}", drawing.ctrl, "ctrl"))
        downloads += [drawing_downloads(session, drawing)] if drawing.finished else []
    return sides_html(drawings[0].request, sides) + "".join(downloads)


def both_status(sessions: tuple[Session, Session], drawings: list[Drawing]) -> str:
    """Say how much is drawn, and each run's certificate."""
    steps = {drawing.request.steps for drawing in drawings}
    words = [] if len(steps) == 1 else ["The runs take different numbers of steps: only the first noise is the same."]
    for session, drawing in zip(sessions, drawings, strict=True):
        words.append(f"{session.name}: {certificate_sentence(session.run, session.metrics, drawing.request)}")
    return progress_html(sum(drawing.now for drawing in drawings) / 2, "<br>".join(words))
