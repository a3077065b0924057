"""Measure the letters prior beside real letters of families that it has not seen."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded import seconds_per_evaluation
from evidence import PICTURES
from PIL import Image
from rich.progress import track
from torch import Tensor

from ctrl_diffusion.chain.noise import stream
from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.data.labelled import to_pixels
from ctrl_diffusion.data.letters import rulers
from ctrl_diffusion.data.letters.rulers import CHARACTERS
from ctrl_diffusion.evaluate.fidelity import frechet_distance, manifolds, nearest_distance
from ctrl_diffusion.evaluate.rulers.table import RULERS
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.scorer import Scorer
from ctrl_diffusion.run.config import Config

from .reader import as_x, is_read
from .shipped import Faces

STEPS, EACH = 25, 32  # of the chain; samples of each letter
CLOSE = 0.05  # quantile of real distances that says what is close
ZOOM, COLUMNS, GAP = 2, 8, 12  # of the page of samples


def chain_times(prior: Prior, steps: int) -> tuple[float, ...]:
    """Return the times of the chain that a run has by default, in a number of steps."""
    defaults = Config.from_values({"prior": "letters", "control": "weight", "data": "-"})
    return prior.denoiser.times(steps, defaults.sigma_end, defaults.time_power)


def draw(prior: Prior, c: Tensor, seed: int, steps: int = STEPS, batch: int = 124) -> Tensor:
    """Draw letters c (n,) as an image file keeps them: x (n, 1, 32, 32), rounded to 256 levels."""
    times, generator, parts = chain_times(prior, steps), stream(seed, "letters"), []
    for rows in track(torch.arange(len(c)).split(batch), "drawing samples"):
        x = paths(prior.denoiser, len(rows), times, generator, {"c": c[rows]}).x_0
        parts.append(torch.from_numpy(to_pixels(x.clamp(-1, 1))).reshape(len(rows), 1, rulers.SIDE, rulers.SIDE))
    return torch.cat(parts).float() / 127.5 - 1


def pick(faces: Faces, each: int, seed: int) -> Tensor:
    """Draw real letters as samples are drawn: `each` of every letter, x (62 · each, 1, 32, 32), large families less."""
    generator = np.random.default_rng(seed)
    face = np.concatenate([generator.choice(len(faces.rows), each, p=faces.weight) for _ in CHARACTERS])
    return as_x(faces.glyphs[face, np.repeat(np.arange(len(CHARACTERS)), each)])


def nearness(x: Tensor, c: Tensor, training: Faces) -> Tensor:
    """Compute the distance of each letter (n,) to the nearest of its kind in the training faces."""
    distance = torch.empty(len(x))
    for letter in c.unique():
        of_letter = c == letter
        distance[of_letter] = nearest_distance(x[of_letter], as_x(training.glyphs[:, letter]))
    return distance


def compared(reader: Scorer, real: Tensor, x: Tensor) -> dict[str, float]:
    """Compare letters with real ones, EACH of every letter in both.

    The Fréchet distance is over the reader's features of all; precision, recall and coverage are over the pixels of one
    letter at a time, means over letters, since a style is near to another only in the same letter.
    """
    shares = [manifolds(a.flatten(1), b.flatten(1)) for a, b in zip(real.split(EACH), x.split(EACH), strict=True)]
    means = [sum(each) / len(shares) for each in zip(*shares, strict=True)]
    names = ("precision", "recall", "coverage")
    frechet = frechet_distance(reader.features(real), reader.features(x))
    return {"frechet": frechet, **dict(zip(names, means, strict=True))}


def measure(prior: Prior, reader: Scorer, faces: Faces) -> tuple[dict[str, Any], Tensor]:
    """Compute the figures of docs/why/prior.md; return them and the samples, EACH of every letter in turn."""
    training, pool, test = (faces[faces.part == name] for name in ("train", "pool", "test"))
    c = torch.arange(len(CHARACTERS)).repeat_interleave(EACH)
    samples, real, others = draw(prior, c, 0), pick(test, EACH, 0), pick(pool, EACH, 1)
    same_families = pick(training, EACH, 2)
    bare = prior.unconditional()
    without_c = paths(bare.denoiser, 496, chain_times(prior, STEPS), stream(0, "without c")).x_0.clamp(-1, 1)
    of_sample, of_real = nearness(samples, c, training), nearness(real, c, training)
    read = is_read(reader, samples, c).float()
    least = [CHARACTERS[i] for i in read.view(-1, EACH).mean(1).argsort()[:8]]
    sure = reader.log_prob(without_c).exp()
    figures = {
        "steps": STEPS,
        "samples": len(c),
        "read_as_asked": {
            "samples": float(read.mean()),
            "unseen families": float(is_read(reader, real, c).float().mean()),
            "least read letters of the samples": least,
        },
        "to_unseen_families": {
            "samples": compared(reader, real, samples),
            "other unseen families": compared(reader, real, others),
            "training families": compared(reader, real, same_families),
        },
        "nearest_training_letter": {
            "samples_median": float(of_sample.median()),
            "unseen_families_median": float(of_real.median()),
            "samples_closer_than_closest_5_percent_of_unseen": float(
                (of_sample < torch.quantile(of_real, CLOSE)).float().mean()
            ),
            "exact_copies": int((of_sample < 1e-3).sum()),
        },
        "null_class": {
            "reader_is_sure": float(sure.amax(1).mean()),
            "reader_is_sure_of_unseen_families": float(reader.log_prob(real).exp().amax(1).mean()),
            "letters_drawn_of_62": len(sure.argmax(1).unique()),
        },
        "rulers": {
            name: {
                "samples": quantiles(RULERS[f"letter-{name}"].number(samples, c)),
                "training families": quantiles(RULERS[f"letter-{name}"].number(same_families, c)),
            }
            for name in ("weight", "slant", "width")
        },
        "milliseconds_per_64_on_one_thread": round(1000 * seconds_per_evaluation(prior, repeats=9), 1),
        "parameters": sum(p.numel() for p in prior.denoiser.network.parameters()),
    }
    return figures, samples


def quantiles(values: Tensor) -> list[float]:
    """Return the 5, 50 and 95 % quantiles of values, those that are missing left out."""
    return torch.quantile(values[values.isfinite()], torch.tensor([0.05, 0.5, 0.95])).tolist()


def sheet(x: Tensor) -> np.ndarray:
    """Lay the 62 letters x (62, 1, 32, 32) in rows of COLUMNS, enlarged: (H, W) uint8."""
    side = rulers.SIDE * ZOOM
    rows = -(-len(x) // COLUMNS)
    page = np.zeros((rows * side, COLUMNS * side), np.uint8)
    for i, pixels in enumerate(to_pixels(x)):
        row, column = divmod(i, COLUMNS)
        large = np.kron(pixels.reshape(rulers.SIDE, rulers.SIDE), np.ones((ZOOM, ZOOM), np.uint8))
        page[row * side : (row + 1) * side, column * side : (column + 1) * side] = large
    return page


def write_page(samples: Tensor, test: Faces, path: Path = PICTURES / "letters-prior.png") -> None:
    """Write the first sample of each letter beside a real one of a family the prior has not seen."""
    first, beside = sheet(samples[::EACH]), sheet(pick(test, 1, 0))
    gap = np.full((first.shape[0], GAP), 255, np.uint8)
    Image.fromarray(np.concatenate([first, gap, beside], axis=1)).save(path)
