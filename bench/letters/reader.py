"""Fit a reader of letters on the training faces, and find faces whose letters it does not read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ctrl_diffusion.data.letters.rulers import CHARACTERS, SIDE
from ctrl_diffusion.reward.fit import Recipe, fit_classifier
from ctrl_diffusion.reward.scorer import Scorer

FITTED, WIDTH = 48_000, 160  # glyphs the reader is fitted on; its features
RECIPE = Recipe(epochs=5, batch=128, lr=4e-3, weight_decay=0.02)
AS_ONE = ("0O", "Il1")  # letters that some faces draw alike: either is right
READ = 0.5  # share of a face's letters that must be read


def network(shape: Sequence[int], classes: int) -> Scorer:
    """Build the reader: three convolutions and two linear layers."""
    trunk = nn.Sequential(
        nn.Conv2d(shape[0], 24, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1),
        nn.GroupNorm(8, 48),
        nn.SiLU(),
        nn.Conv2d(48, 64, 3, stride=2, padding=1),
        nn.GroupNorm(8, 64),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, WIDTH),
        nn.SiLU(),
    )
    return Scorer(trunk, WIDTH, classes)


def as_x(glyphs: np.ndarray) -> Tensor:
    """Bring pictures (n, 32, 32) uint8 to x (n, 1, 32, 32) in [−1, 1]."""
    return torch.from_numpy(glyphs).float().unsqueeze(1) / 127.5 - 1


def fit_reader(glyphs: np.ndarray, seed: int = 0) -> Scorer:
    """Fit a reader on glyphs drawn from faces (n, 62, 32, 32)."""
    generator = np.random.default_rng(seed)
    pick = generator.permutation(glyphs.shape[0] * len(CHARACTERS))[:FITTED]
    c = torch.from_numpy(pick % len(CHARACTERS))
    return fit_classifier(as_x(glyphs.reshape(-1, SIDE, SIDE)[pick]), c, len(CHARACTERS), network, RECIPE, seed=seed)


def load_reader(path: Path) -> Scorer:
    """Read a reader's weights."""
    reader = network((1, SIDE, SIDE), len(CHARACTERS))
    reader.load_state_dict(torch.load(path, weights_only=True))
    return reader.requires_grad_(False).eval()


def groups() -> Tensor:
    """Return the number of each of the 62 letters, the same for letters that count as one."""
    number = torch.arange(len(CHARACTERS))
    for same in AS_ONE:
        number[[CHARACTERS.index(each) for each in same]] = CHARACTERS.index(same[0])
    return number


@torch.no_grad()
def is_read(reader: Scorer, x: Tensor, c: Tensor) -> Tensor:
    """Return whether the reader reads the letters c (n,) in x (n, 1, 32, 32), or one that counts as the same: (n,)."""
    group = groups()
    return group[reader.log_prob(x).argmax(1)] == group[c]


def shares_read(reader: Scorer, glyphs: np.ndarray) -> np.ndarray:
    """Return the share of letters the reader reads of each face (n, 62, 32, 32): (n,)."""
    c = torch.arange(len(CHARACTERS))
    return np.array([float(is_read(reader, as_x(each), c).float().mean()) for each in glyphs])
