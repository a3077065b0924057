"""Setting a word from pictures of letters."""

import numpy as np
import pytest
import torch

from ctrl_diffusion.chain.noise import normal
from ctrl_diffusion.report.word import letter_noise, sheet_pixels, word_grid, word_picture

HEIGHT = 32
GAP, BLANK = 2, 10  # of this height


def letter(left, right, top=6, bottom=24, paper=-1.0, ink=1.0, channels=1):
    """A picture with a block of ink."""
    x = torch.full((channels, HEIGHT, HEIGHT), paper)
    x[:, top:bottom, left:right] = ink
    return x


def ink_of(word, paper=-1.0):
    """The columns with ink, as runs (first, last)."""
    inked = ((word - paper).abs() > 0.3).any(0).any(0).int().tolist()
    edges = np.flatnonzero(np.diff([0, *inked, 0]))
    return [(first, last - 1) for first, last in edges.reshape(-1, 2).tolist()]


def test_letters_stand_side_by_side_by_their_ink():
    word = word_picture(torch.stack([letter(10, 13), letter(4, 28), letter(20, 22)]), "imi")
    assert ink_of(word) == [(2, 4), (7, 30), (33, 34)]
    assert word.shape == (1, HEIGHT, 37)


def test_rows_stay_so_that_the_baseline_is_common():
    tall, deep = letter(0, 5, 6, 24), letter(3, 9, 12, 31)
    word = word_picture(torch.stack([tall, deep]), "Tp")
    rows = [word[0, :, first] > 0 for first, _ in ink_of(word)]
    assert [(int(row.nonzero()[0]), int(row.nonzero()[-1])) for row in rows] == [(6, 23), (12, 30)]


def test_a_blank_is_a_gap_and_takes_no_picture():
    pictures = torch.stack([letter(10, 14), letter(10, 14)])
    (_, end), (start, _) = ink_of(word_picture(pictures, "a b"))
    assert start - end - 1 == GAP + BLANK
    (_, end), (start, _) = ink_of(word_picture(pictures, "ab"))
    assert start - end - 1 == GAP


def test_a_word_that_is_not_whole_yet_ends_where_its_pictures_do():
    pictures = torch.stack([letter(10, 14), letter(10, 14)])
    assert torch.equal(word_picture(pictures, "abcd"), word_picture(pictures, "ab"))


@pytest.mark.parametrize("channels", [1, 3])
def test_dark_ink_on_light_paper_is_ink_too(channels):
    dark = torch.stack([letter(10, 13, paper=0.9, ink=-1, channels=channels)] * 2)
    word = word_picture(dark, "ll")
    assert ink_of(word, 0.9) == [(2, 4), (7, 9)]
    assert word.shape == (channels, HEIGHT, 12)
    assert word[:, 0, 0].eq(0.9).all()


def test_faint_specks_do_not_count_and_an_empty_picture_keeps_its_room():
    speck = letter(10, 13)
    speck[0, 3, 30] = -0.8
    assert ink_of(word_picture(speck[None], "l")) == [(2, 4)]
    assert word_picture(torch.full((1, 1, HEIGHT, HEIGHT), -1.0), "l").shape[2] == HEIGHT + 2 * GAP


def test_a_grid_has_columns_of_one_width():
    words = [word_picture(letter(0, width)[None], "l") for width in (4, 10, 6)]
    grid = word_grid(words, 2)
    assert grid.shape == (1, 2 * HEIGHT, 2 * (10 + 2 * GAP))
    assert ink_of(grid[:, :HEIGHT]) == [(5, 8), (16, 25)]
    assert ink_of(grid[:, HEIGHT:]) == [(4, 9)]
    assert sheet_pixels(words[0]).shape == (96, 3 * 8)
    assert sheet_pixels(grid, 2).shape == (192, 3 * 28)


def test_the_noise_of_a_letter_does_not_depend_on_those_after_it():
    shape = (1, 4, 4)

    def noise(n):
        generators = letter_noise(3, n)
        return torch.stack([normal((n, *shape), torch.zeros(1), generators) for _ in range(3)])  # of three steps

    assert torch.equal(noise(2), noise(5)[:, :2])
    assert len(noise(5).flatten(2).flatten(0, 1).unique(dim=0)) == 15
    assert not torch.equal(letter_noise(4, 1)[0].get_state(), letter_noise(3, 1)[0].get_state())
