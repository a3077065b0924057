"""Files that ship with the package."""

from pathlib import Path

DIGITS = Path(__file__).parent / "digits"
