"""Fetch fonts from Debian's packages, and find the licence of each font file."""

import gzip
import re
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

TEXLIVE = "texlive-fonts-extra"
# packages of Debian main whose faces have Latin letters
PACKAGES = tuple((Path(__file__).parent / "packages.txt").read_text(encoding="utf-8").splitlines())
KINDS = (".otf", ".ttf", ".pfb")
# what a licence is called in a copyright file or a font → its name here; the first that is found counts
FREE = {
    r"\bofl\b|open font licen[cs]e|scripts\.sil\.org/ofl|openfontlicense": "OFL",
    r"\bapache": "Apache",
    r"bitstream[ -]?vera": "Bitstream Vera",
    r"\bgust\b|\bgfl\b|gust font licen[cs]e": "GUST",
    r"\blppl": "LPPL",
    r"\bagpl|affero general public": "AGPL",
    r"\blgpl|lesser general public|library general public": "LGPL",
    r"\bgpl|general public licen[cs]e": "GPL",
    r"\bmit\b|\bexpat\b|permission is hereby granted, free of charge": "MIT",
    r"\bbsd": "BSD",
    r"\bcc0\b": "CC0",
    r"\bcc-by(-sa)?-[0-9]|creative ?commons attribution(?!.{0,3}non)": "CC-BY",
    r"public[ -]domain|^pd$": "public domain",
}


@dataclass
class FontFile:
    """Hold a font file, the package it came in, and its licence; None where it could not be established."""

    path: Path
    package: str
    licence: str | None


def licence_in(text: str) -> str | None:
    """Return the name of the free licence that a text names, None if it names none that is known."""
    return next((name for pattern, name in FREE.items() if re.search(pattern, text, re.I | re.M)), None)


def download(folder: Path) -> list[Path]:
    """Download the packages that the folder lacks by `apt-get download`, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in PACKAGES if not any(folder.glob(f"{name}_*.deb"))]
    if missing:
        print(f"fonts: downloading {len(missing)} of {len(PACKAGES)} packages")
        subprocess.run(["apt-get", "download", "-q", *missing], cwd=folder, check=True)
    return [next(folder.glob(f"{name}_*.deb")) for name in PACKAGES]


def unpack(debs: list[Path], folder: Path) -> None:
    """Unpack each package into a folder of its name, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for deb in debs:
        target = folder / deb.name.partition("_")[0]
        if not target.is_dir():
            subprocess.run(["dpkg-deb", "-x", str(deb), str(target.with_suffix(".part"))], check=True)
            target.with_suffix(".part").rename(target)


def texlive_licences(root: Path) -> dict[str, str]:
    """Read which licences TeX Live gives its packages: their name, or the name of a folder of fonts → tags."""
    text = gzip.decompress((root / f"usr/share/doc/{TEXLIVE}/Licenses.gz").read_bytes()).decode("utf-8", "replace")
    licences, folders, tags = {}, {}, ""
    for line in text.splitlines():
        if line.startswith("texmf-dist/fonts/") and line.endswith("/*"):
            folders.setdefault(line[:-2].rpartition("/")[2], tags)
        elif match := re.match(r"([^ /]+): *(.*)$", line):
            tags = licences[match[1]] = match[2]
    return folders | licences


def copyright_licences(text: str) -> str:
    """Return the licence lines of a package's copyright file, but for those of its packaging; else the whole text."""
    lines = []
    for stanza in re.split(r"\n\s*\n", text):
        files = re.search(r"^Files: *(.*)$", stanza, re.M)
        licence = re.search(r"^License: *(.*)$", stanza, re.M)
        if files and licence and not fnmatch(files[1].strip(), "debian/*"):
            lines.append(licence[1])
    return "\n".join(lines) or text


def font_files(folder: Path) -> list[FontFile]:
    """List the font files of unpacked packages with their licences; Type 1 only where a folder has no other."""
    files = []
    for root in sorted(folder.iterdir()):
        package, paths = root.name, sorted(p for p in root.rglob("*") if p.suffix.lower() in KINDS and p.is_file())
        if package == TEXLIVE:
            tags, better = texlive_licences(root), {p.parent.name for p in paths if p.suffix.lower() != ".pfb"}
            paths = [p for p in paths if p.suffix.lower() != ".pfb" or p.parent.name not in better]
            named = {p: licence_in(tags.get(p.parent.name, "")) for p in paths}
            files += [FontFile(p, f"{package}/{p.parent.name}", named[p]) for p in paths]
            continue
        notices = sorted(root.glob("usr/share/doc/*/copyright*"))
        text = notices[0].read_bytes().decode("utf-8", "replace") if notices and notices[0].is_file() else ""
        files += [FontFile(p, package, licence_in(copyright_licences(text))) for p in paths]
    return files
