"""Set a word from pictures of its letters: one picture a letter, each from noise of its own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..chain.noise import stream
from ..data.labelled import to_pixels
from ..run.run import Run

MOST_CHARACTERS = 12
INKED = 0.3  # how far a pixel is from the paper, in [−1, 1], where it counts as ink
GAP, BLANK = 1 / 16, 5 / 16  # between two letters, and of a blank, in heights of a picture
SHEET_HEIGHT = 96  # of a word on a sheet in pixels, at least


def alphabet(run: Run) -> dict[str, int]:
    """Return the class of every character that the run knows; none where the prior's classes are no characters.

    Classes without a name are called by their numbers, which say nothing of what they show.
    """
    names = run.prior.class_names
    if run.prior.text or any(len(name) != 1 for name in names) or all(name == str(i) for i, name in enumerate(names)):
        return {}
    return {names[c]: c for c in run.known_classes or ()}


def checked_word(run: Run, word: object, most: int = MOST_CHARACTERS) -> str:
    """Return a word without blanks around it; refuse (ValueError) a longer one, and characters without a class.

    A blank or None is no word, of any run.
    """
    if word is None or (isinstance(word, str) and not word.strip()):
        return ""
    characters = alphabet(run)
    if not characters:
        raise ValueError("this prior's classes are not single characters: leave the word out.")
    if not isinstance(word, str) or len(word.strip()) > most:
        raise ValueError(f"the word must be a text of at most {most} characters, got {str(word)[:40]!r}.")
    if unknown := [character for character in dict.fromkeys(word.strip()) if character not in (*characters, " ")]:
        raise ValueError(f"this run has no class for {', '.join(map(repr, unknown))}. Choose other characters.")
    return word.strip()


def letters_of(run: Run, word: str) -> Tensor:
    """Return the classes (n,) of a word's letters; a blank is none."""
    characters = alphabet(run)
    return torch.tensor([characters[character] for character in word if character != " "])


def letter_noise(seed: int, n: int) -> list[torch.Generator]:
    """Return a generator for each of n letters; that of a letter is the same however many follow."""
    return [stream(seed, f"letter {i}") for i in range(n)]


def word_picture(pictures: Tensor, word: str) -> Tensor:
    """Set pictures (n, C, H, W) in [−1, 1] of a word's letters side by side: (C, H, W').

    Each is cut to the columns with ink; rows stay, so that letters keep their common baseline. Paper is the commonest
    value, a blank a gap. Where the last letters are not drawn yet, the word ends before them.
    """
    height = pictures.shape[2]
    paper = pictures.transpose(0, 1).flatten(1).median(1).values[:, None, None]
    gap, blank = (paper.expand(-1, height, max(1, round(share * height))) for share in (GAP, BLANK))
    parts, rest = [gap], iter(pictures)
    for character in word:
        picture = None if character == " " else next(rest, None)
        if picture is None and character != " ":
            break
        parts += [blank] if picture is None else [inked(picture, paper), gap]
    return torch.cat(parts, 2)


def inked(picture: Tensor, paper: Tensor) -> Tensor:
    """Cut a picture (C, H, W) to its columns from the first to the last with ink; all of it where there is none."""
    columns = ((picture - paper).abs().mean(0).amax(0) > INKED).nonzero().squeeze(1)
    return picture[:, :, columns[0] : columns[-1] + 1] if len(columns) else picture


def word_grid(words: Sequence[Tensor], columns: int) -> Tensor:
    """Set words (C, H, W') row by row in columns of the widest's width: (C, H', W'')."""
    paper, height = words[0][:, :1, :1], words[0].shape[1]
    widest, rows = max(word.shape[2] for word in words), -(-len(words) // columns)
    canvas = paper.repeat(1, rows * height, columns * widest)
    for i, word in enumerate(words):
        top, left = i // columns * height, i % columns * widest + (widest - word.shape[2]) // 2
        canvas[:, top : top + height, left : left + word.shape[2]] = word
    return canvas


def sheet_pixels(picture: Tensor, rows: int = 1) -> np.ndarray:
    """Return the bytes of a word, or of a grid of rows (C, H', W'); small ones are enlarged without smoothing."""
    times = max(1, SHEET_HEIGHT * rows // picture.shape[1])
    return to_pixels(picture[None])[0].repeat(times, 0).repeat(times, 1)
