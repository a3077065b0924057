"""Lay pictures and what is read of them out as HTML, as one PNG, and as a zip with the command that makes it again."""

import base64
import io
import zipfile
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import torch
from PIL import Image

from ...data.labelled import to_pixels
from ...run.run import Run
from ..word import alphabet, sheet_pixels, word_picture
from .readings import Picture, Reading, certificate_sentence, tally, target_accuracy
from .request import Request
from .session import Drawing, Session

PIXELATED = 96  # sides up to this many pixels are enlarged without smoothing
SHEET_SIDE, SHEET_COLUMNS = 96, 8  # of a picture on the sheet in pixels, at least; and pictures in a row
WORD_HEIGHT = 128  # of a word above its letters in pixels, at most


def png(pixels: np.ndarray) -> bytes:
    """Return pixels (H, W) or (H, W, C) as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(kind: str, content: bytes) -> str:
    """Return bytes as an address that needs no request."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def pixels_of(pictures: Sequence[Picture]) -> np.ndarray:
    """Return the bytes (n, H, W) or (n, H, W, C) of pictures."""
    return to_pixels(torch.stack([picture.image for picture in pictures]))


def reading_html(reading: Reading, named: bool) -> str:
    """Say in a line what p̂ says of a picture, and in another what the ruler or the judge sees."""
    name = f"{reading.control} " if named else ""
    says = escape(f"{name}p̂ {reading.says}") if reading.says else "p̂ –"
    share = "" if reading.share is None else f" <i>{reading.share:.0%}</i>"
    mark = {True: " <b class='hit'>✓</b>", False: " <b class='miss'>✗</b>", None: ""}[reading.right]
    sees = f"<span>{escape(reading.by)} {escape(reading.sees)}{mark}</span>" if reading.by else ""
    return f"<span>{says}{share}</span>{sees}"


def card_html(picture: Picture, pixels: np.ndarray, place: int) -> str:
    """Show a picture with what is read of it; a frame and a word mark one outside the region p̂ knows."""
    small = " small" if max(pixels.shape[:2]) <= PIXELATED else ""
    outside = "<span class='out' title='outside the region that p̂ was fitted on'>outside</span>"
    text = "".join(reading_html(reading, len(picture.readings) > 1) for reading in picture.readings)
    name = escape(picture.c, quote=True)
    return (
        f"<figure class='{'outside' if picture.outside else ''}'>"
        f"<img class='picture{small}' src='{data_url('image/png', png(pixels))}' alt='picture {place}: {name}'>"
        f"<figcaption>{text}{outside if picture.outside else ''}</figcaption></figure>"
    )


def cards_of(pictures: Sequence[Picture]) -> list[str]:
    """Show each picture as `card_html` does."""
    pixels = pixels_of(pictures) if pictures else []
    return [card_html(*row, place) for place, row in enumerate(zip(pictures, pixels, strict=True), start=1)]


def word_of(pictures: Sequence[Picture], word: str) -> torch.Tensor:
    """Set pictures of a word's letters as the word (C, H, W')."""
    return word_picture(torch.stack([picture.image for picture in pictures]), word)


def word_html(picture: torch.Tensor, word: str, size: str) -> str:
    """Show a word (C, H, W') in a size, as CSS says it."""
    address, name = data_url("image/png", png(to_pixels(picture[None])[0])), escape(word, quote=True)
    return f"<img class='word' src='{address}' alt='the word {name}' style='{size}'>"


def sides_html(request: Request, sides: Sequence[tuple[str, Sequence[Picture], str]]) -> str:
    """Show sides, each a title, pictures and a kind, beside each other; of a word below each other, in one scale."""
    words = [word_of(pictures, request.word) if request.word and pictures else None for _, pictures, _ in sides]
    widest, shown = max((word.shape[2] for word in words if word is not None), default=1), []
    for (title, pictures, kind), word in zip(sides, words, strict=True):
        image = ""
        if word is not None:
            _, height, width = word.shape
            most = width * WORD_HEIGHT // height
            image = word_html(word, request.word, f"width: min({100 * width / widest:.2f}%, {most}px)")
        shown.append(side_html(title, image, pictures, request.n, kind))
    return f"<div class='sides{' words' if request.word else ''}'>{''.join(shown)}</div>"


def side_html(title: str, word: str, pictures: Sequence[Picture], n: int, kind: str) -> str:
    """Show a title, how many are as asked so far, a word, and the pictures; places of those to come are empty."""
    cards = cards_of(pictures)
    cards += ["<figure class='empty'><div></div></figure>"] * (n - len(pictures))
    return (
        f"<section class='side {kind}'><h3>{escape(title)}</h3><p>{share_note(pictures)}</p>{word}"
        f"<div class='cards'>{''.join(cards)}</div></section>"
    )


def share_note(pictures: Sequence[Picture]) -> str:
    """Say how many pictures are as asked so far."""
    hits, known = tally(pictures)
    return f"<b>{hits} of {known}</b> as asked ({hits / known:.0%})" if known else "nothing asked"


def drawing_html(session: Session, drawing: Drawing) -> str:
    """Show the prior and the control side by side."""
    request = drawing.request
    controlled = f"With the control: {request.in_words}", drawing.ctrl, "ctrl"
    sides = sides_html(request, [("Without the control", drawing.prior, "prior"), controlled])
    return sides + (drawing_downloads(session, drawing) if drawing.finished else "")


def drawing_downloads(session: Session, drawing: Drawing) -> str:
    """Offer a finished drawing's controlled pictures, as the word if they are one."""
    request, pictures = drawing.request, drawing.ctrl
    commands = [request.command(session.run, session.folder)]
    if not request.word:
        return downloads_html(pictures, commands)
    return downloads_html(pictures, commands, png(sheet_pixels(word_of(pictures, request.word))), "word.png")


def progress_html(now: float, words: str) -> str:
    """Show a bar and a few words, which a screen reader says."""
    finished = now >= 1
    bar = f"<progress class='bar {'done' if finished else ''}' max='1' value='{now:.3f}' aria-label='drawn'></progress>"
    return f"{bar}<p class='words' role='status'>{words}</p>"


def status_html(session: Session, drawing: Drawing) -> str:
    """Say how many are as asked so far against the target, and the certificate in one sentence."""
    run, request = session.run, drawing.request
    hits, known = tally(drawing.ctrl)
    target = target_accuracy(run, session.metrics, request)
    said = f"<b>{hits} of {known} as asked</b> so far. " if known else ""
    if known and target is not None and request.strength > 0:
        said += f"Of many, a perfect learner has {target:.0%} right. "
    said += escape(certificate_sentence(run, session.metrics, request))
    return progress_html(drawing.now, said)


def error_html(error: object) -> str:
    """Show an error in one line."""
    return f"<p class='words error' role='alert'>{escape(str(error))}</p>"


def sheet(pictures: Sequence[Picture], columns: int = SHEET_COLUMNS) -> bytes:
    """Return a PNG of pictures in rows, small ones enlarged without smoothing."""
    pixels = pixels_of(pictures)
    times = max(1, SHEET_SIDE // max(pixels.shape[1:3]))
    pixels = pixels.repeat(times, 1).repeat(times, 2)
    gap, (height, width) = max(4, pixels.shape[1] // 16), pixels.shape[1:3]
    rows, columns = -(-len(pixels) // columns), min(columns, len(pixels))
    size = rows * (height + gap) - gap, columns * (width + gap) - gap
    canvas = np.full((*size, *pixels.shape[3:]), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return png(canvas)


def zipped(pictures: Iterable[Picture], commands: Sequence[str], grid: bytes, name: str = "grid.png") -> bytes:
    """Return a zip of the pictures as `ctrl sample` names them, a sheet of them, and the commands that draw them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, pixels in enumerate(pixels_of(list(pictures))):
            archive.writestr(zipfile.ZipInfo(f"{i:05d}.png"), png(pixels))
        archive.writestr(zipfile.ZipInfo(name), grid)
        archive.writestr(zipfile.ZipInfo("command.txt"), "".join(f"{command}\n" for command in commands))
    return buffer.getvalue()


def downloads_html(
    pictures: Sequence[Picture], commands: Sequence[str], grid: bytes | None = None, name: str = "grid.png"
) -> str:
    """Offer pictures as a PNG, `grid` or a sheet of them, and as a zip, and show the command that draws them.

    No request is made for either.
    """
    grid = grid or sheet(pictures)
    archive = zipped(pictures, commands, grid, name)
    more = f" … and {len(commands) - 1} more in the zip" if len(commands) > 1 else ""
    return (
        "<div class='downloads'>"
        f"<a download='samples.png' href='{data_url('image/png', grid)}'>Download PNG</a>"
        f"<a download='samples.zip' href='{data_url('application/zip', archive)}'>Download zip</a>"
        f"<code>{escape(commands[0])}{more}</code></div>"
    )


def headline_html(sessions: Sequence[Session]) -> str:
    """Say in two sentences what the page shows."""
    names = list(dict.fromkeys(name for session in sessions for name in session.run.names))
    word = (
        " A word stands above as it was, and below with the control." if any(alphabet(s.run) for s in sessions) else ""
    )
    return (
        f"<header><h1>Turn {escape(' and '.join(names[:3]))}</h1><p>Every pair of pictures starts from the same noise: "
        "on the left the model as it was, on the right with the control. Choose a value and see what changes."
        f"{word}</p></header>"
    )


def legend_html(run: Run) -> str:
    """Explain the words under the pictures."""
    by = (
        "The <b>ruler</b> measures the picture itself; it made the labels."
        if run.accuracy_by == "ruler"
        else "The <b>judge</b> is a second classifier, fitted on labels that p̂ never saw."
    )
    near = " (on a scale to the nearest level)" if any(c.space.scale for c in run.policy.controls.values()) else ""
    return (
        "<p class='legend'><b>p̂</b> is the classifier that was the control’s reward: its label, and how sure it is. "
        f"{by} <b class='hit'>✓</b> as asked{near}, <b class='miss'>✗</b> not. <span class='out'>outside</span> marks "
        "a picture unlike all that p̂ was fitted on: there its word counts little.</p>"
    )
