"""Draw the labelled sets that ship with the package, and fit the judge of serif."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctrl_diffusion.data.letters import rulers, sets
from ctrl_diffusion.data.letters.rulers import CHARACTERS
from ctrl_diffusion.evaluate.rulers.table import RULERS
from ctrl_diffusion.reward.fit import Recipe, fit_classifier
from ctrl_diffusion.reward.scorer import Classifier, Scorer

from .reader import as_x

LABELS, REAL_FACES = 500, 16  # of each set; faces of the real letters, all 62 of each
TRIALS = 500  # deals of families to sets, of which the most even is kept
JUDGED = 6000  # letters of either class that the judge of serif is fitted on
JUDGE = Recipe(epochs=10, batch=64, lr=4e-3, weight_decay=0.05)


class Faces(NamedTuple):
    """Hold faces: glyphs (n, 62, 32, 32), rows of what is known of each, family numbers and parts."""

    glyphs: np.ndarray
    rows: list[dict[str, Any]]
    family: np.ndarray
    part: np.ndarray

    def __getitem__(self, which: np.ndarray) -> "Faces":
        numbers = np.nonzero(which)[0] if which.dtype == bool else which
        rows = [self.rows[i] for i in numbers]
        return Faces(self.glyphs[numbers], rows, self.family[numbers], self.part[numbers])

    @property
    def serif(self) -> np.ndarray:
        """The class of serif (n,), −1 where a font is silent."""
        return np.array([sets.SERIFS.index(row["serif"]) if row["serif"] else -1 for row in self.rows])

    @property
    def weight(self) -> np.ndarray:
        """The share with which each face is drawn (n,): large families less often."""
        share = np.bincount(self.family)[self.family] ** -0.5
        return share / share.sum()

    def weight_of(self, serif: int) -> np.ndarray:
        """Return the share with which each face of a class of serif is drawn (n,), 0 for the others."""
        share = np.where(self.serif == serif, self.weight, 0.0)
        return share / share.sum()


def deal(pool: Faces, seed: int = 0) -> np.ndarray:
    """Deal the families of the pool to the three sets: (n,) set names.

    Of many random deals the one is kept that leaves each set the most faces of the kinds it needs: labelled ones of
    either class to serif, slanted ones to slant.
    """
    generator, serif = np.random.default_rng(seed), pool.serif
    slanted = np.array([row["angle"] != 0 for row in pool.rows])
    families, member = np.unique(pool.family, return_inverse=True)
    best, most = None, -1.0
    for _ in range(TRIALS):
        of_face = generator.choice(3, len(families), p=(0.3, 0.3, 0.4))[member]
        kinds = [(of_face == 0).sum() / 2, ((of_face == 1) & slanted).sum(), ((of_face == 1) & ~slanted).sum()]
        kinds += [((of_face == 2) & (serif == label)).sum() for label in (0, 1)]
        if min(kinds) > most:
            best, most = of_face, min(kinds)
    return np.array(sets.SETS)[best]


def draw_labels(faces: Faces, count: int, share: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw distinct letters of faces, these by their shares: numbers of faces and of letters (count,)."""
    each = np.repeat(share / len(CHARACTERS), len(CHARACTERS))
    return np.divmod(generator.choice(len(each), count, replace=False, p=each), len(CHARACTERS))


def labelled(name: str, faces: Faces, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw a set of LABELS letters with their labels: arrays x, c, y, family."""
    generator = np.random.default_rng([seed, sets.SETS.index(name)])
    if name == sets.SERIF:
        halves = []
        for label in range(len(sets.SERIFS)):
            halves.append(draw_labels(faces, LABELS // 2, faces.weight_of(label), generator))
        face, c = (np.concatenate(each) for each in zip(*halves, strict=True))
        y = faces.serif[face].astype(np.int8)
    else:
        face, c = draw_labels(faces, LABELS, faces.weight, generator)
        y = RULERS[f"letter-{name}"].number(as_x(faces.glyphs[face, c]), torch.from_numpy(c)).numpy().astype(np.float32)
    order = generator.permutation(LABELS)
    face, c, y = face[order], c[order], y[order]
    return {"x": faces.glyphs[face, c], "c": c.astype(np.uint8), "y": y, "family": faces.family[face].astype(np.int16)}


def real(test: Faces, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the real letters: all 62 of REAL_FACES faces, each of another family."""
    generator, taken, families = np.random.default_rng(seed), [], set()
    for face in generator.permutation(len(test.rows)):
        if test.family[face] not in families and len(taken) < REAL_FACES:
            taken.append(face)
            families.add(test.family[face])
    face, c = np.repeat(taken, len(CHARACTERS)), np.tile(np.arange(len(CHARACTERS)), len(taken))
    arrays = {"x": test.glyphs[face, c], "c": c.astype(np.uint8), "y": test.serif[face].astype(np.int8)}
    return arrays | {"family": test.family[face].astype(np.int16)}


def write_sets(faces: Faces, path: Path = sets.FILE) -> dict[str, Any]:
    """Write the three sets and the real letters, and return what is in them."""
    pool = faces[faces.part == "pool"]
    dealt, arrays, about = deal(pool), {}, {}
    for name in sets.SETS:
        of_set = labelled(name, pool[dealt == name])
        arrays |= {f"{name}_{key}": value for key, value in of_set.items()}
        y, families = of_set["y"], np.unique(of_set["family"])
        low, middle, high = np.quantile(y, (0.05, 0.5, 0.95))
        about[name] = {"labels": len(y), "families": len(families), "low": low, "median": middle, "high": high}
    arrays |= {f"{sets.REAL}_{key}": value for key, value in real(faces[faces.part == "test"]).items()}
    np.savez_compressed(path, **arrays)
    sets.arrays.cache_clear()
    return {**about, "bytes": path.stat().st_size}


def letters_with_serif(faces: Faces) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, serif and letter of every glyph of the faces whose font says whether it has serifs."""
    said = faces[faces.serif >= 0]
    c = torch.arange(len(CHARACTERS)).repeat(len(said.rows))
    y = torch.from_numpy(said.serif).repeat_interleave(len(CHARACTERS))
    return as_x(said.glyphs.reshape(-1, rulers.SIDE, rulers.SIDE)), y, c


def draw_with_serif(faces: Faces, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw x, serif and letter of JUDGED letters of either class, large families less often."""
    generator, parts = np.random.default_rng(seed), []
    for label in range(len(sets.SERIFS)):
        face, c = draw_labels(faces, JUDGED, faces.weight_of(label), generator)
        parts.append((as_x(faces.glyphs[face, c]), torch.full((JUDGED,), label), torch.from_numpy(c)))
    x, y, c = map(torch.cat, zip(*parts, strict=True))
    return x, y, c


def judge_network(shape: Sequence[int], classes: int) -> Classifier:
    """Build the judge of serif given the letter: three convolutions."""
    return Classifier(shape[0], classes, grid=4, depth=3, halvings=2, width=32, conditions=len(CHARACTERS))


def fit_judge(faces: Faces, seed: int = 0) -> tuple[Scorer, dict[str, float]]:
    """Fit the judge of serif on the judge and training parts; return it with its accuracy on the test families."""
    x, y, c = draw_with_serif(faces[np.isin(faces.part, ("judge", "train"))], seed)
    judge = fit_classifier(x, y, len(sets.SERIFS), judge_network, JUDGE, c=c, seed=seed)
    test = faces[faces.part == "test"]
    x, y, c = letters_with_serif(test)
    right = judge.log_prob(x, c).argmax(1) == y
    of_class = [float(right[y == label].float().mean()) for label in range(len(sets.SERIFS))]
    of_letter = [float(right[c == letter].float().mean()) for letter in range(len(CHARACTERS))]
    worst = [CHARACTERS[i] for i in np.argsort(of_letter)[:8]]
    of_face = right.view(-1, len(CHARACTERS)).float().mean(1).round()
    figures = {"letters": len(y), "accuracy": sum(of_class) / 2, **dict(zip(sets.SERIFS, of_class, strict=True))}
    return judge, {**figures, "faces_by_most_letters": float(of_face.mean()), "hardest": worst}
