"""Fit what the rulers expect of each letter, and check the rulers on families they were not fitted on."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from ctrl_diffusion.data.digits import moments
from ctrl_diffusion.data.letters import rulers
from ctrl_diffusion.evaluate.rulers.table import RULERS

from .faces import CHARACTERS, font_of_size

RIDGE, VIEWS = 10.0, 3  # weight decay of the correction of slants; shears of each picture it is fitted on
STEEPEST = 15.0  # degrees: a face said to be upright that leans more is not fitted on
SHEARS, STRETCHES = (-10.0, 10.0, 20.0), (0.8, 1.2)
LARGER = 6  # a face is drawn this much larger to measure its strokes finely


def is_upright(row: dict[str, Any]) -> bool:
    """Return whether a face says that it is upright, by its angle and its name."""
    slanted = ("italic", "oblique", "slanted", "script")
    return row["angle"] == 0 and not any(word in row["name"].lower() for word in slanted)


def paper_at(glyphs: np.ndarray, letter: int) -> Tensor:
    """Return the ink (n, 32, 32), 0 … 1, of one letter of faces (n, 62, 32, 32)."""
    return torch.from_numpy(glyphs[:, letter].astype(np.float32) / 255)


def fit_letter(paper: Tensor) -> tuple[float, np.ndarray, np.ndarray, float]:
    """Return lean, mean picture, correction and offset of one letter from its upright pictures (n, 32, 32).

    Each is sheared by VIEWS angles first: what a picture looks like once it is upright must not say whence it came.
    """
    slopes = moments(paper).slope
    lean = slopes.median()
    usual = (slopes - lean).atan().rad2deg().abs() < STEEPEST
    generator = torch.Generator().manual_seed(0)
    paper, own = paper[usual].repeat(VIEWS, 1, 1), (slopes - lean)[usual].repeat(VIEWS)
    by = torch.tan(torch.deg2rad(STEEPEST * (2 * torch.rand(len(paper), generator=generator) - 1)))
    paper = rulers.sheared(paper, by)
    shape = rulers.reduced(rulers.sheared(paper, -(moments(paper).slope - lean))).double()
    own, centred = own.double(), shape - shape.mean(0)
    system = centred.mT @ centred + RIDGE * torch.eye(shape.shape[1], dtype=torch.float64)
    correction = torch.linalg.solve(system, centred.mT @ (own - own.mean()))
    return float(lean), shape.mean(0).numpy(), correction.numpy(), float(own.mean())


def fit_expected(glyphs: np.ndarray, rows: list[dict[str, Any]], path: Path) -> None:
    """Fit what is expected of every letter on faces (n, 62, 32, 32), and write it."""
    upright = np.array([is_upright(row) for row in rows])
    fits = [fit_letter(paper_at(glyphs[upright], letter)) for letter in range(len(CHARACTERS))]
    arrays = dict(zip(("lean", "picture", "correction", "offset"), map(np.array, zip(*fits, strict=True)), strict=True))
    arrays["width"] = np.ones(len(CHARACTERS))
    write_expected(path, arrays)
    for letter in range(len(CHARACTERS)):  # its width is measured with the slant that was just fitted
        paper = paper_at(glyphs, letter)
        flat = torch.full((len(paper),), letter)
        extent = rulers.extent(rulers.sheared(paper, -rulers.leaning(paper, flat))) / rulers.CAP
        arrays["width"][letter] = float(extent.log().mean().exp())
    write_expected(path, arrays)


def write_expected(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write what the rulers expect in half precision, and have it read anew."""
    np.savez_compressed(path, **{name: array.astype(np.float16) for name, array in arrays.items()})
    rulers.expected.cache_clear()


def finely_measured(path: Path, letter: str) -> float:
    """Return the mean stroke width in cap heights of a letter drawn LARGER times as large."""
    font = font_of_size(path, LARGER)
    left, top, right, bottom = font.getbbox(letter, anchor="ls")
    canvas = Image.new("L", (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), letter, fill=255, font=font, anchor="ls")
    distance = ndimage.distance_transform_edt(np.asarray(canvas) >= 128)
    ridge = (distance == ndimage.maximum_filter(distance, 5)) & (distance > 0)
    return float(np.mean(2 * distance[ridge] - 1) / LARGER / rulers.CAP)


def drawn_at(path: Path, letter: str, shear: float = 0.0, stretch: float = 1.0) -> np.ndarray:
    """Draw a letter large, shear it by an angle and stretch it, and reduce it to the picture (32, 32) of a face."""
    font = font_of_size(path, LARGER)
    side, base = rulers.SIDE * LARGER, rulers.BASELINE * LARGER
    left, _, right, _ = font.getbbox(letter, anchor="ls")
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text(((side - left - right) / 2, base), letter, fill=255, font=font, anchor="ls")
    slope, middle = np.tan(np.radians(shear)), side / 2
    # what of the canvas a pixel (x, y) of the result shows; the mean of the shear over the letter's height is taken off
    lift = slope * rulers.CAP * LARGER / 2
    matrix = (1 / stretch, slope / stretch, middle + (lift - middle - slope * base) / stretch, 0, 1, 0)
    turned = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(turned.reduce(LARGER))


def read_at(rows: list[dict[str, Any]], root: Path, name: str, **change: float) -> np.ndarray:
    """Return what a ruler reads of every letter of faces (n, 62), drawn anew with a change."""
    letters = torch.arange(len(CHARACTERS))
    readings = []
    for row in rows:
        drawn = np.stack([drawn_at(root / row["path"], letter, **change) for letter in CHARACTERS])
        x = torch.from_numpy(drawn.astype(np.float32)).unsqueeze(1) / 127.5 - 1
        readings.append(RULERS[f"letter-{name}"].number(x, letters).numpy())
    return np.array(readings)


def check_slant(rows: list[dict[str, Any]], root: Path) -> list[dict[str, float]]:
    """Read known angles of upright faces: what each letter, and the median of a face's letters, is off by."""
    table = []
    for angle in (0.0, *SHEARS):
        off = read_at(rows, root, "slant", shear=angle) - angle
        face = np.nanmedian(off, axis=1)
        table.append(
            {
                "angle": angle,
                "letter_median_error": float(np.nanmedian(np.abs(off))),
                "letter_mean_error": float(np.nanmean(np.abs(off))),
                "letters_within_1.5": float((np.abs(off) <= 1.5).mean()),
                "face_mean_error": float(np.abs(face).mean()),
                "faces_within_1.5": float((np.abs(face) <= 1.5).mean()),
                "bias": float(np.nanmean(off)),
            }
        )
    return table


def check_width(rows: list[dict[str, Any]], root: Path) -> list[dict[str, float]]:
    """Read known stretches: the ratio to the reading of the same letter as it is, over the stretch."""
    plain = read_at(rows, root, "width")
    table = []
    for factor in STRETCHES:
        ratio = read_at(rows, root, "width", stretch=factor) / plain / factor
        table.append({"stretch": factor, "median_ratio": float(np.nanmedian(ratio)), "spread": float(np.nanstd(ratio))})
    return table


def check_weight(rows: list[dict[str, Any]], root: Path) -> dict[str, float]:
    """Compare the ruler with the same measure of the outline at LARGER times the size."""
    fine = np.array([[finely_measured(root / row["path"], letter) for letter in CHARACTERS] for row in rows])
    coarse = read_at(rows, root, "weight")
    x, y = fine.ravel(), coarse.ravel()
    slope, offset = np.polyfit(x, y, 1)
    return {
        "r2": float(np.corrcoef(x, y)[0, 1] ** 2),
        "mean_error": float(np.abs(y - x).mean()),
        "bias": float((y - x).mean()),
        "line_slope": float(slope),
        "line_offset": float(offset),
        "r2_of_face_means": float(np.corrcoef(fine.mean(1), coarse.mean(1))[0, 1] ** 2),
    }
