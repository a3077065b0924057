"""The testbed's whole programme, for docs/exact.json and its pictures (`make bench`; about an hour on one thread).

python bench/exact.py
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "exact"
        subprocess.run([sys.executable, "-m", "ctrl_diffusion", "exact", "--out", str(out)], check=True)
        shutil.copy(out / "exact.json", DOCS / "exact.json")
        for name in ("density", "gap", "growth"):
            shutil.copy(out / f"{name}.png", DOCS / f"exact-{name}.png")


if __name__ == "__main__":
    main()
