import math

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl_diffusion.data.letters import rulers
from ctrl_diffusion.data.letters.rulers import BASELINE, CAP, CHARACTERS, FINER, SIDE, slant, weight, width
from ctrl_diffusion.data.letters.sets import REAL, letters

LARGER = 8  # pictures are changed at this size, so that the change itself is exact


def bar(thickness: float, upright: bool = True) -> torch.Tensor:
    """A stroke as long as a capital is high, of some thickness in pixels, grey where it fills a part of one."""
    large = np.zeros((SIDE * LARGER, SIDE * LARGER), np.float32)
    half = round(thickness * LARGER / 2)
    large[(BASELINE - CAP) * LARGER : BASELINE * LARGER, SIDE * LARGER // 2 - half : SIDE * LARGER // 2 + half] = 1
    small = large.reshape(SIDE, LARGER, SIDE, LARGER).mean((1, 3))
    return torch.from_numpy(small if upright else small.T.copy())[None, None] * 2 - 1


def changed(x: torch.Tensor, degrees: float = 0.0, stretch: float = 1.0) -> torch.Tensor:
    """Pictures sheared to the right about half a capital's height, and stretched about the middle."""
    slope, middle, centre = math.tan(math.radians(degrees)), SIDE * LARGER / 2, (BASELINE - CAP / 2) * LARGER
    matrix = (1 / stretch, slope / stretch, middle - (middle + slope * centre) / stretch, 0, 1, 0)
    pictures = []
    for picture in x[:, 0]:
        image = Image.fromarray((picture.numpy() + 1) / 2)
        large = image.resize((SIDE * LARGER,) * 2, Image.Resampling.BILINEAR)
        turned = large.transform(large.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        pictures.append(torch.from_numpy(np.asarray(turned.reduce(LARGER)).copy()))
    return torch.stack(pictures)[:, None] * 2 - 1


@pytest.fixture(scope="module")
def real():
    """Four of the real faces, all letters of each."""
    every = letters(REAL)
    return every.x[: 4 * len(CHARACTERS)], every.c[: 4 * len(CHARACTERS)]


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("thickness", [0.5, 1, 1.5, 2, 3, 4, 6])
def test_the_weight_of_a_stroke_is_its_thickness_over_the_height_of_capitals(thickness, upright):
    measured = float(weight(bar(thickness, upright))) * CAP
    # an edge is known to half a step of the finer grid at either side; the ridge of a stroke runs into its corners
    assert abs(measured - thickness) <= 1 / FINER + 0.1 * thickness


def test_slant_reads_a_shear_of_real_letters_to_one_and_a_half_degrees(real):
    x, c = real
    plain = slant(changed(x), c)
    for degrees in (-10, 5, 12):
        off = slant(changed(x, degrees), c) - plain - degrees
        slack = 1.5 + 0.02 * plain.abs()  # tan adds up, degrees do not quite
        assert (off.abs() <= slack).float().mean() > 0.97, degrees
        assert abs(float(off.median())) < 0.5, degrees


def test_width_reads_a_stretch_of_real_letters(real):
    x, c = real
    plain = width(changed(x), c)
    for factor in (0.8, 1.2):
        ratio = width(changed(x, stretch=factor), c) / plain / factor
        # a picture is a pixel's blur wider at either end, which a narrow letter notices
        assert abs(float(ratio.median()) - 1) < 0.05, factor


def test_slant_and_weight_do_not_depend_on_each_other(real):
    x, _ = real
    leaning = changed(x, 10)
    assert abs(float((weight(leaning) / weight(changed(x))).median()) - 1) < 0.1  # cos 10° is 0.985, and blur


def test_most_upright_letters_are_read_as_upright():
    """Over all the real faces most are upright, so that the median letter is."""
    every = letters(REAL)
    assert abs(float(slant(every.x, every.c).median())) < 1.5


def test_a_shear_moves_the_slope_by_as_much(real):
    x, _ = real
    paper = rulers.paper_of(x)
    by = torch.full((len(paper),), 0.2)
    moved = rulers.moments(rulers.sheared(paper, by)).slope - rulers.moments(paper).slope
    # ink that a shear carries over the border of the picture is lost
    assert float((moved - by).abs().median()) < 0.005
