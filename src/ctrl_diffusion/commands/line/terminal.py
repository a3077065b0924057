"""Write to a terminal or file of any code page: what it lacks is spelled out in ASCII, and no output fails."""

import codecs
import sys
import unicodedata

SPELLED = str.maketrans({
    "×": "x", "−": "-", "–": "-", "—": "-", "·": "*", "±": "+-", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "→": "->",
    "’": "'", "‘": "'", "“": '"', "”": '"', "⁄": "/", "\u0302": "^",
})  # fmt: skip


def spelled(text: str) -> str:
    """Spell text in ASCII: × as x, γ as gamma, é as e; what has no spelling as its escape, such as \\u0434."""
    letters = []
    for character in unicodedata.normalize("NFKD", text).translate(SPELLED):
        case, greek, name = unicodedata.name(character, "").partition(" LETTER ")
        if greek and case in ("GREEK SMALL", "GREEK CAPITAL") and " " not in name:
            letters.append(name.lower() if case == "GREEK SMALL" else name.capitalize())
        elif not unicodedata.combining(character):  # an accent without its letter says nothing
            letters.append(character)
    return "".join(letters).encode("ascii", "backslashreplace").decode("ascii")


def spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what an encoding lacks: bytes of a file's name that are no text by themselves, the rest as `spelled`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text, start, end = error.object, error.start, error.end
    if 0xDC80 <= ord(text[start]) <= 0xDCFF:
        return bytes([ord(text[start]) - 0xDC00]), start + 1
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return spelled(text[start:end]), end


def spell_output() -> None:
    """Let standard output and error spell what their code page lacks, from now on."""
    codecs.register_error("ctrl", spell)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else it is none, or a program's own
            stream.reconfigure(errors="ctrl")
