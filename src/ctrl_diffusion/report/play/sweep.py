"""Draw a grid: one control by another, or by the strength."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from threading import Event
from typing import Any

from ..word import checked_word, sheet_pixels, word_grid
from .cards import cards_of, downloads_html, png, progress_html, sheet, word_html, word_of
from .readings import Picture, tally
from .request import Request, number
from .session import Session

STRENGTH, NONE = "strength", "none"
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
MOST_VALUES, MOST_EACH = 11, 4  # values of a control on an axis, and pictures in a cell
MOST_OF_WORDS = 5  # values of a control on an axis where a cell is a word
WIDTH, HEIGHTS = 640, (20, 96)  # in pixels: of a row of words that is to fit, and of a word


@dataclass(frozen=True)
class Sweep:
    """Hold a grid of requests, row by row, and what is drawn of it so far."""

    rows: Sequence[str]
    columns: Sequence[str]
    names: tuple[str, str]  # of the rows and of the columns
    requests: Sequence[Request]
    left_out: int = 0  # values of both axes that have no row or column
    cells: tuple[tuple[Picture, ...], ...] = ()

    @property
    def shown(self) -> bool:
        """Whether to send what is drawn so far: the first row cell by cell, the others row by row.

        A table is sent whole each time, so that one for every cell would weigh the square of the cells.
        """
        done, across = len(self.cells), len(self.columns)
        return done <= across or done % across == 0


def axis(session: Session, name: str, most: int) -> tuple[list[Any], list[str], int]:
    """Return the values of an axis, null first and `most` of a control, their names, and how many are left out."""
    if name == STRENGTH:
        return list(STRENGTHS), [f"{w:g}" for w in STRENGTHS], 0
    if name not in session.run.policy.controls:
        raise ValueError(f"unknown control {str(name)[:40]!r}; this run has: {session.run.name}.")
    values = session.run.policy.controls[name].values
    count = min(most, len(values))
    kept = [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
    return ["", *kept], [NONE, *kept], len(values) - count


def grid_of(session: Session, rows: str, columns: str, values: dict[str, Any]) -> Sweep:
    """Return the grid of a control by another or by `STRENGTH`; `values` are a request's.

    Raises ValueError as `Request.checked` does.
    """
    if rows in (columns, STRENGTH):
        raise ValueError("rows are a control, and columns another or the strength.")
    most = MOST_OF_WORDS if checked_word(session.run, values.get("word")) else MOST_VALUES
    (row_values, row_names, a), (column_values, column_names, b) = (axis(session, n, most) for n in (rows, columns))
    values = {**values, "n": number("how many", values["n"], 1, MOST_EACH, whole=True)}
    requests = []
    for row in row_values:
        for column in column_values:
            cell = {**values, "labels": {rows: row}}
            cell |= {"strength": column} if columns == STRENGTH else {"labels": {rows: row, columns: column}}
            requests.append(Request.checked(session.run, cell))
    return Sweep(row_names, column_names, (rows, columns), requests, a + b)


def draw_sweep(session: Session, sweep: Sweep, stop: Event) -> Iterator[Sweep]:
    """Yield the grid as it grows, a cell at a time; all cells have the same noise. Raises Stopped as `draw` does."""
    cells = []
    for request in sweep.requests:
        yield (grown := Sweep(**{**vars(sweep), "cells": tuple(cells)}))
        for drawing in session.draw(request, stop):
            last = drawing
        cells.append(last.ctrl)
    yield Sweep(**{**vars(grown), "cells": tuple(cells)})


def sweep_html(session: Session, sweep: Sweep) -> str:
    """Show the grid as a table; a cell has its pictures, or the word of them, and how many are as asked."""
    word = sweep.requests[0].word
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in sweep.columns)
    body, across = [], len(sweep.columns)
    for i, name in enumerate(sweep.rows):
        cells = sweep.cells[i * across : (i + 1) * across]
        row = "".join(cell_html(cell, word, across) for cell in cells) + "<td></td>" * (across - len(cells))
        body.append(f"<tr><th scope='row'>{escape(name)}</th>{row}</tr>")
    corner = f"{escape(sweep.names[0])} ↓ &nbsp; {escape(sweep.names[1])} →"
    table = f"<table><thead><tr><th>{corner}</th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    shown = f"<div class='sweep'>{table}</div>"
    if len(sweep.cells) < len(sweep.requests):
        return shown
    pictures = [picture for cell in sweep.cells for picture in cell]
    commands = [request.command(session.run, session.folder) for request in sweep.requests]
    if word:
        words = word_grid([word_of(cell, word) for cell in sweep.cells], across)
        return shown + downloads_html(pictures, commands, png(sheet_pixels(words, len(sweep.rows))))
    return shown + downloads_html(pictures, commands, sheet(pictures, across * sweep.requests[0].n))


def cell_html(pictures: Sequence[Picture], word: str, across: int) -> str:
    """Show the pictures of a cell, or the word of them, `across` of which are a row, and how many are as asked."""
    if word:
        height = min(max(2 * WIDTH / (across * len(word)), HEIGHTS[0]), HEIGHTS[1])  # a letter is half as wide as high
        shown = word_html(word_of(pictures, word), word, f"height: {height:.0f}px")
    else:
        shown = "".join(cards_of([picture._replace(readings=()) for picture in pictures]))
    hits, known = tally(pictures)
    note = f"<small>{hits} of {known}</small>" if known else "<small>–</small>"
    return f"<td><div>{shown}</div>{note}</td>"


def sweep_status(sweep: Sweep) -> str:
    """Say how much of a grid is drawn, and what it leaves out."""
    done, of = len(sweep.cells), len(sweep.requests)
    left = f" {sweep.left_out} values have no place in it." if sweep.left_out else ""
    words = f"{done} of {of} cells. All have the same noise; below each, how many are as asked.{left}"
    return progress_html(done / of, words)
