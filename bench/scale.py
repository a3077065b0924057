"""Ink as a number on a scale: values asked for against those measured (about ten minutes a seed on one quiet thread).

python bench/scale.py [SEED …]        (0 1 2 if none is given)

500 digits with their ink as a number, the embedded prior, every setting but the classifier's the default. Writes the
rows of these seeds into docs/scale.json and the picture of seed 0.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from ctrl_diffusion.commands.jobs import demo
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.labelled import save_image, to_pixels
from ctrl_diffusion.system.files import write_json

DOCS = Path(__file__).parent.parent / "docs"


def write_measured(folder: Path, seed: int) -> None:
    """The ink demo's labelled digits with the number itself."""
    data = demo.labelled_digits("ink", seed)[0][0]
    rows = ["file_name,digit,ink"]
    values = zip(to_pixels(data.x), data.labels["digit"], rulers.ink(data.x), strict=True)
    for i, (pixels, digit, ink) in enumerate(values):
        save_image(folder / f"{i}.png", pixels)
        rows.append(f"{i}.png,{digit},{ink:.6f}")
    (folder / "metadata.csv").write_text("\n".join(rows))


def measured(seed: int, root: Path) -> dict:
    """Train and return the figures."""
    write_measured(root / "data", seed)
    classifier = {key: value for key, value in demo.OF_INK.items() if key != "head"}
    settings = {"prior": "digits", "control": "ink", "kind": "scale", "data": "data", "condition": "digit"}
    (root / "scale.yaml").write_text(
        yaml.safe_dump({**settings, "ruler": "ink", "classifier": classifier, "seed": seed})
    )
    run = root / "run"
    arguments = ["train", "--config", str(root / "scale.yaml"), "--out", str(run), "--quiet"]
    subprocess.run([sys.executable, "-m", "ctrl_diffusion", *arguments], check=True)
    if seed == 0:
        shutil.copy(run / "scale-ink.png", DOCS / "scale.png")
    metrics = json.loads((run / "metrics.json").read_text())
    return {"seed": seed, **{k: metrics[k] for k in ("scale", "prior", "target", "ctrl", "certificate", "classifier")}}


def main() -> None:
    out = DOCS / "scale.json"
    for seed in [int(text) for text in sys.argv[1:]] or [0, 1, 2]:
        with TemporaryDirectory() as folder:
            row = measured(seed, Path(folder))
        known = json.loads(out.read_text()) if out.is_file() else []
        write_json(out, sorted([row, *(r for r in known if r["seed"] != seed)], key=lambda r: r["seed"]))
        print(seed, row["scale"]["ink"], {k: row["classifier"][k] for k in ("r2", "ece", "nll")})


if __name__ == "__main__":
    main()
