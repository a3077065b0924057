"""A stranger's pipeline through the commands classifier, train, sample and evaluate (`make bench`).

examples/textures.py makes the pipeline and 300 labelled images; every setting is the default. Writes docs/own.json and
docs/own.png.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import print_json

from ctrl_diffusion.system.files import write_json

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def python(*arguments: object) -> None:
    """Run Python as a user does."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def ctrl(*arguments: object) -> None:
    """Run a command as a user does."""
    python("-m", "ctrl_diffusion", *arguments)


def main() -> None:
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        python(ROOT / "examples" / "textures.py", "--out", root)
        fitted, run = root / "classifier", root / "run"
        own = ("--control", "texture", "--prior", root / "pipeline")
        ctrl("classifier", root / "photos", *own, "--out", fitted)
        ctrl("train", "--data", root / "photos", *own, "--classifier", fitted, "--out", run)
        ctrl("sample", run, "--set", "texture=checks", "-n", 16, "--out", root / "checks")
        ctrl("evaluate", run, "-n", 600, "--out", root / "figures.json")
        metrics = json.loads((run / "metrics.json").read_text())
        del metrics["versions"]
        metrics["evaluated_again"] = json.loads((root / "figures.json").read_text())["ctrl"]
        write_json(DOCS / "own.json", metrics)
        shutil.copy(run / "grid.png", DOCS / "own.png")
        shown = {name: metrics[name] for name in ("prior", "target", "ctrl", "classifier", "seconds")}
        print_json(data={**shown, "gap_nats": metrics["certificate"]["gap_nats"]})


if __name__ == "__main__":
    main()
