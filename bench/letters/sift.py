"""Leave out faces whose letters are not letters or not their own, join families that are one, and split them."""

import hashlib
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .faces import CHARACTERS

INK = 48  # of 255: what counts as ink; hairlines are grey
SAME, KIN = 0.08, 0.18  # relative difference of two faces: one face twice; faces of one design
ONE_PIECE = "CILTVcvlz127"  # letters of one piece without a hole
ALIKE = {frozenset(pair) for group in ("O0", "Il1", "o0", "Oo", "cC", "sS") for pair in combinations(group, 2)}
LIKE_CAPITALS = "abdeghnqrt"  # small letters that are no smaller capitals
SMALL_CAPITALS = 0.44  # their median unlikeness to capitals, below which they are
SPLIT = {"train": 0.5, "pool": 0.22, "judge": 0.11, "test": 0.17}  # shares of the families of at most MOST / 2 faces
MOST = 36  # faces of one family


def is_broken(glyphs: np.ndarray) -> bool:
    """Return whether letters of one piece come in several, or have holes, in more than one case: outlines, stencils."""
    bad = 0
    for character in ONE_PIECE:
        ink = glyphs[CHARACTERS.index(character)] >= INK
        _, pieces = ndimage.label(ink, np.ones((3, 3)))
        _, grounds = ndimage.label(np.pad(~ink, 1))
        bad += pieces != 1 or grounds != 1
    return bad > 2


def box(picture: np.ndarray, side: int = 16) -> np.ndarray:
    """Cut a picture to its ink and resize it to a square."""
    rows, columns = np.nonzero(picture.max(1) > INK // 2)[0], np.nonzero(picture.max(0) > INK // 2)[0]
    if not len(rows) or not len(columns):
        return np.zeros((side, side), np.float32)
    cut = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    return ndimage.zoom(cut, (side / cut.shape[0], side / cut.shape[1]), order=1, grid_mode=True, mode="nearest")


def unlikeness(a: np.ndarray, b: np.ndarray) -> float:
    """Return the difference of two pictures over the geometric mean of their norms, both slightly blurred."""
    a, b = ndimage.gaussian_filter(a, 1.0), ndimage.gaussian_filter(b, 1.0)
    return float(np.linalg.norm(a - b) / np.sqrt(np.linalg.norm(a) * np.linalg.norm(b) + 1e-9))


def has_small_capitals(glyphs: np.ndarray) -> bool:
    """Return whether most small letters have the shape of their capitals."""
    pairs = [(box(glyphs[CHARACTERS.index(s)]), box(glyphs[CHARACTERS.index(s.upper())])) for s in LIKE_CAPITALS]
    return float(np.median([unlikeness(small, capital) for small, capital in pairs])) < SMALL_CAPITALS


def draws_two_alike(glyphs: np.ndarray) -> bool:
    """Return whether two letters that should differ are nearly the same picture."""
    flat = glyphs.reshape(len(glyphs), -1).astype(np.float32) / 255
    square = (flat**2).sum(1)
    distance = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * flat @ flat.T, 0) / flat.shape[1])
    close = [
        frozenset((CHARACTERS[i], CHARACTERS[j])) for i, j in zip(*np.nonzero(distance < 0.03), strict=True) if i < j
    ]
    return any(pair not in ALIKE for pair in close)


def reason_against(glyphs: np.ndarray) -> str | None:
    """Return why a face is left out by its pictures, None if it is kept."""
    if is_broken(glyphs):
        return "draws letters in pieces or as outlines"
    if has_small_capitals(glyphs):
        return "draws capitals for small letters"
    if draws_two_alike(glyphs):
        return "draws two letters alike"
    return None


def distances(glyphs: np.ndarray) -> np.ndarray:
    """Return the difference of every two faces (n, n), at half the resolution, over the geometric mean of their norms.

    It does not depend on how much ink there is: two hairline faces differ by as much as two bold ones.
    """
    n = len(glyphs)
    half = glyphs.reshape(n, 62, 16, 2, 16, 2).mean((3, 5), dtype=np.float32).reshape(n, -1) / 255
    square = np.maximum((half**2).sum(1), 1e-6)
    difference = np.maximum(square[:, None] + square[None] - 2 * half @ half.T, 0)
    return np.sqrt(difference / np.sqrt(square[:, None] * square[None]))


def distinct(distance: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return which faces stay when of those that look the same only the first in an order does: (n,) bool."""
    kept = np.zeros(len(distance), bool)
    for face in order:
        kept[face] = not (distance[face, kept] < SAME).any()
    return kept


def families(names: list[str], distance: np.ndarray) -> np.ndarray:
    """Give each face the number of its family (n,): faces of one name, or of one design, belong together."""
    _, by_name = np.unique(names, return_inverse=True)
    first = {name: i for i, name in reversed(list(enumerate(by_name)))}
    pairs = [(i, first[name]) for i, name in enumerate(by_name)]
    pairs += list(zip(*np.nonzero(distance < KIN), strict=True))
    i, j = np.array(pairs).T
    graph = coo_matrix((np.ones(len(i)), (i, j)), shape=distance.shape)
    return connected_components(graph, directed=False)[1]


def split(family: np.ndarray, names: list[str], seed: int = 0) -> np.ndarray:
    """Deal families (n,) to the parts of SPLIT by a hash of their first name, large ones to training: (n,) part names.

    A face more or less does not move other families.
    """
    parts, bounds = list(SPLIT), np.cumsum(list(SPLIT.values()))
    part = np.empty(len(family), dtype="U8")
    for number in np.unique(family):
        members = np.nonzero(family == number)[0]
        digest = hashlib.sha256(f"{seed} {min(names[i] for i in members)}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        small = len(members) <= MOST // 2  # a part of a few large families would say little
        part[members] = parts[int(np.searchsorted(bounds, place, side="right"))] if small else "train"
    return part


def count_by_reason(glyphs: np.ndarray) -> tuple[np.ndarray, Counter]:
    """Return which faces stay (n,) by their pictures alone, and the others counted by reason."""
    reasons = [reason_against(each) for each in glyphs]
    return np.array([reason is None for reason in reasons]), Counter(reason for reason in reasons if reason)


def cap_families(family: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return which faces stay (n,) when each family keeps MOST at the most, drawn by a seed."""
    kept = np.zeros(len(family), bool)
    for face in np.random.default_rng(seed).permutation(len(family)):
        kept[face] = (kept & (family == family[face])).sum() < MOST
    return kept


def sifted(rows: list[dict[str, Any]], glyphs: np.ndarray) -> tuple[np.ndarray, np.ndarray, Counter]:
    """Return the numbers of the faces that stay, their families, and how many were left out for which reason."""
    good, left_out = count_by_reason(glyphs)
    stay = np.nonzero(good)[0]
    distance = distances(glyphs[stay])
    kept = distinct(distance, np.argsort([rows[i]["path"].endswith(".pfb") for i in stay], kind="stable"))
    left_out["looks like another face"] += int((~kept).sum())
    stay, distance = stay[kept], distance[np.ix_(kept, kept)]
    family = families([rows[i]["family"] for i in stay], distance)
    kept = cap_families(family)
    left_out[f"is one of more than {MOST} faces of a family"] += int((~kept).sum())
    return stay[kept], family[kept], left_out
