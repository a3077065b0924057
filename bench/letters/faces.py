"""Read a font file: what it says of itself, and its 62 glyphs as pictures."""

import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from ctrl_diffusion.data.letters.rulers import BASELINE, CAP, CHARACTERS, SIDE

from .fonts import FontFile, licence_in

logging.getLogger("fontTools").setLevel(logging.CRITICAL)  # it says of each font what is odd in it

POINTS = 400  # of a font that is measured
FINER = 6  # glyphs are drawn this much larger, and reduced
MARGIN = 0.5  # pixels that stay empty at each border
# what a font may say of its serifs: bSerifStyle of panose, the class in sFamilyClass, a word of its name
PANOSE = {**dict.fromkeys(range(2, 11), "serif"), **dict.fromkeys(range(11, 16), "sans")}
CLASSES = {**dict.fromkeys((1, 2, 3, 4, 5, 7), "serif"), 8: "sans"}
WORDS = {"sans": "sans", "grotesk": "sans", "gothic": "sans", "serif": "serif", "slab": "serif"}
# words of style, which are no part of a family's name
STYLES = re.compile(
    r"thin|hairline|extralight|ultralight|light|book|regular|roman|normal|medium|semi|demi|semibold|demibold"
    r"|bold|extrabold|ultrabold|heavy|black|fat|ultra|extra|italic|oblique|slanted|condensed|cond|narrow|wide"
    r"|expanded|extended|compressed|caps|sc|smallcaps|small|osf|lf|tlf|display|disp|text|caption|subhead"
    r"|headline|titling|poster|deck|micro|pro|std|otf|ttf|type1|t1|mt|ps|nf|gwf|alt|alternate|x|upright"
    r"|backslanted|back|slant|it|bd|md|lt|rg|sb|xb"
)


@dataclass
class Face:
    """Hold what is known of a face before it is drawn."""

    path: str
    package: str
    name: str
    family: str  # its name without words of style, in lower case
    licence: str | None
    serif: str | None  # "serif", "sans", None where the font does not say
    weight: int | None  # usWeightClass
    angle: float | None  # italicAngle, degrees, clockwise positive

    def row(self) -> dict[str, Any]:
        """Return it as a row of a table."""
        return asdict(self)


def family_of(name: str) -> str:
    """Reduce a face's name to its family: lower case, no words of style, no numbers."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name.replace("_", " "))
    kept = [word.lower() for word in words if not STYLES.fullmatch(word.lower())]
    return " ".join(kept[:3]) or name.lower()


def serif_of(os2: Any, name: str) -> str | None:
    """Return whether a font says that it has serifs; None where it does not say, or contradicts itself."""
    words = name.lower().replace("sans serif", "sans")
    said = {kind for word, kind in WORDS.items() if word in words}
    if os2 is not None:
        said.add(CLASSES.get(os2.sFamilyClass >> 8))
        if os2.panose.bFamilyType == 2:  # others count serifs by another table
            said.add(PANOSE.get(os2.panose.bSerifStyle))
    said.discard(None)
    return said.pop() if len(said) == 1 else None


def read_type1(file: FontFile) -> Face:
    """Read the clear part of a Type 1 font."""
    text = file.path.read_bytes()[:8192].decode("latin-1")

    def field(name: str) -> str:
        match = re.search(rf"/{name}\s*(?:\((.*?)\)|([-\d.]+))", text)
        return (match[1] or match[2] or "") if match else ""

    name = field("FullName") or file.path.stem
    licence = file.licence or licence_in(f"{field('Notice')} {text[:1500]}")
    angle = -float(field("ItalicAngle")) if re.fullmatch(r"-?\d+\.?\d*", field("ItalicAngle")) else None
    family = family_of(field("FamilyName") or name)
    return Face(str(file.path), file.package, name, family, licence, serif_of(None, name), None, angle)


def read_face(file: FontFile) -> Face | str:
    """Return what a font says of itself, or why it cannot be used."""
    if file.path.suffix.lower() == ".pfb":
        return read_type1(file)
    try:
        with TTFont(file.path, lazy=True, fontNumber=0) as font:
            cmap = font.getBestCmap() or {}
            names = {i: font["name"].getDebugName(i) or "" for i in (1, 4, 13, 14, 16)}
            os2, post = font.get("OS/2"), font.get("post")
            serif = serif_of(os2, f"{names[16] or names[1]} {names[4]}")
            weight, angle = getattr(os2, "usWeightClass", None), -post.italicAngle if post else None
    except Exception as error:  # fontTools has one for each table
        return f"cannot be read ({type(error).__name__})"
    if any(ord(character) not in cmap for character in CHARACTERS):
        return "lacks glyphs"
    licence = file.licence or licence_in(f"{names[13]} {names[14]}")
    name = names[4] or file.path.stem
    return Face(
        str(file.path), file.package, name, family_of(names[16] or names[1] or name), licence, serif, weight, angle
    )


def large_font(path: Path | str) -> ImageFont.FreeTypeFont:
    """Open a font at POINTS, to measure it."""
    return ImageFont.truetype(str(path), POINTS, layout_engine=ImageFont.Layout.BASIC)


def cap_height(font: ImageFont.FreeTypeFont) -> float:
    """Return the height of a font's capitals in pixels, the median of those with a flat top."""
    return float(np.median([-font.getbbox(character, anchor="ls")[1] for character in "EHITXZ"]))


def font_of_size(path: Path | str, larger: int) -> ImageFont.FreeTypeFont:
    """Open a font whose capitals are `larger` times CAP pixels high."""
    large = large_font(path)
    return large.font_variant(size=POINTS * CAP * larger / cap_height(large))


def draw(path: Path | str) -> np.ndarray | str:
    """Draw the 62 glyphs of a font, (62, 32, 32) uint8, ink bright, or say why it cannot be.

    Capitals are CAP pixels high, all stand on one baseline, and each is centred on the width of its ink.
    """
    try:
        if not 80 <= cap_height(large_font(path)) <= 800:
            return "has capitals of no height"
        return draw_all(font_of_size(path, FINER))
    except (OSError, ValueError, ZeroDivisionError, MemoryError) as error:
        return f"cannot be drawn ({type(error).__name__})"


def draw_all(font: ImageFont.FreeTypeFont) -> np.ndarray | str:
    """Draw the 62 glyphs with a font of the right size, or say which one does not fit."""
    pictures, side = [], SIDE * FINER
    for character in CHARACTERS:
        left, top, right, bottom = font.getbbox(character, anchor="ls")
        if right <= left or bottom <= top:
            return "draws nothing for a letter"
        room, margin = side - 2 * MARGIN * FINER, MARGIN * FINER
        if right - left > room or -top > BASELINE * FINER - margin or bottom > (SIDE - BASELINE) * FINER - margin:
            return "does not fit the picture"
        canvas = Image.new("L", (side, side))
        x = round((side - (left + right)) / 2)
        ImageDraw.Draw(canvas).text((x, BASELINE * FINER), character, fill=255, font=font, anchor="ls")
        pictures.append(np.asarray(canvas.reduce(FINER)))
    return np.stack(pictures)
