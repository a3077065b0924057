"""Where each method's bias comes from, on the testbed (about ten minutes on one quiet core).

python bench/bias.py

Runs `ctrl compare exact` and writes docs/bias.json and docs/bias.png, which docs/baselines.md quotes.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

DOCS = Path(__file__).parent.parent / "docs"


def main() -> None:
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ctrl_diffusion", "compare", "exact", "--out", folder]
        subprocess.run(command, check=True)
        for name in ("bias.json", "bias.png"):
            shutil.copy(Path(folder) / name, DOCS / name)


if __name__ == "__main__":
    main()
