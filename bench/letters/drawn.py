"""Draw every face, in several processes, and write what could be drawn and why the rest could not."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from .faces import draw, read_face
from .fonts import FontFile

Drawn = tuple[dict[str, Any], np.ndarray] | str


def face_of(file: FontFile) -> Drawn:
    """Read and draw one font file; return its row and glyphs, or why it is left out."""
    face = read_face(file)
    if isinstance(face, str):
        return face
    if face.licence is None:
        return "has no licence known as free"
    glyphs = draw(file.path)
    return glyphs if isinstance(glyphs, str) else (face.row(), glyphs)


def draw_faces(files: list[FontFile]) -> tuple[list[dict[str, Any]], np.ndarray, Counter]:
    """Return the rows and glyphs (n, 62, 32, 32) of the faces that could be drawn, and the others counted by reason."""
    rows, glyphs, left_out = [], [], Counter()
    with ProcessPoolExecutor() as pool:
        for drawn in track(pool.map(face_of, files, chunksize=16), "drawing faces", total=len(files)):
            if isinstance(drawn, str):
                left_out[drawn] += 1
            else:
                rows.append(drawn[0])
                glyphs.append(drawn[1])
    return rows, np.stack(glyphs), left_out


def relative(rows: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """Make the paths of rows relative to the folder of unpacked packages."""
    return [row | {"path": Path(row["path"]).relative_to(root).as_posix()} for row in rows]
