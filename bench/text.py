"""A text-to-image pipeline trained for real, and ink, through the commands train, sample and evaluate (`make bench`).

python bench/text.py [SEED …]        (0 if none is given)

examples/text_digits.py makes the pipeline and 500 labelled images. Writes the rows of these seeds into docs/text.json
and seed 0's grid to docs/text.png. Ink is judged by the judge the job fits, and measured here as the labels were: the
mean pixel between the borders of the labelled images.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import yaml
from PIL import Image
from rich import print_json

from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.files import write_json

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# of what the defaults would do, as much as a busy thread does in twenty minutes
SETTINGS = {
    "guidance": 1.0,
    "rank": 32,
    "classifier": {"head": "ordinal", "grid": 1, "depth": 1, "augment": "any_side_up", "updates": 4000},
    "weighted": {"updates": 500, "cache": 800, "renoising": 125},
    "adjoint": {"updates": 260},
    "evaluation": {"prior_samples": 400, "paths": 1000, "probes": 5, "sweep_paths": 80},
}


def python(*arguments: object) -> None:
    """Run Python as a user does."""
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def ctrl(*arguments: object) -> None:
    """Run a command as a user does."""
    python("-m", "ctrl_diffusion", *arguments)


def borders(photos: Path) -> torch.Tensor:
    """The mean pixels, 0 … 255, half-way between the classes of ink of the labelled images."""
    with (photos / "metadata.csv").open(encoding="utf-8") as file:
        known = [
            (int(row["ink"]), np.asarray(Image.open(photos / row["file_name"])).mean()) for row in csv.DictReader(file)
        ]
    inks = [[weight for ink, weight in known if ink == k] for k in (1, 2, 3, 4)]
    return torch.tensor([(max(low) + min(high)) / 2 for low, high in zip(inks, inks[1:], strict=False)])


def measured(run: Path, photos: Path, each: int) -> float:
    """The share of samples, `each` for every prompt and ink, whose mean pixel is in the class that was asked for."""
    opened = Run.load(run)
    pair = torch.arange(40).repeat_interleave(each)
    x = opened.sample(pair % 4, pair // 4, generator=torch.Generator().manual_seed(3))
    weight = ((x + 1) * 127.5).double().flatten(1).mean(1)
    return float((torch.bucketize(weight, borders(photos)) == pair % 4).double().mean())


def row_of(seed: int, root: Path) -> dict:
    """One seed's run in root/seed, in figures."""
    run, sevens, figures = (root / f"{seed}{what}" for what in ("", "-sevens", ".json"))
    about = ("--prior", root / "pipeline", "--data", root / "photos", "--control", "ink", "--condition", "prompt")
    ctrl("train", *about, "--config", root / "text.yaml", "--seed", seed, "--out", run)
    ctrl("sample", run, "--set", "ink=4", "--class", "a handwritten seven", "-n", 16, "--out", sevens)
    ctrl("evaluate", run, "-n", 400, "--out", figures)
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["versions"]
    measure = {"ink_measured": round(measured(run, root / "photos", 25), 4)}
    again = {"evaluated_again": json.loads(figures.read_text())["ctrl"]}
    return {"seed": seed, **measure, **metrics, **again, "settings": SETTINGS}


def main() -> None:
    path = DOCS / "text.json"
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        python(ROOT / "examples" / "text_digits.py", "--out", root)
        (root / "text.yaml").write_text(yaml.safe_dump(SETTINGS))
        for seed in [int(text) for text in sys.argv[1:]] or [0]:
            row = row_of(seed, root)
            known = json.loads(path.read_text()) if path.is_file() else []
            write_json(path, sorted([row, *(r for r in known if r["seed"] != seed)], key=lambda r: r["seed"]))
            if seed == 0:
                shutil.copy(root / "0" / "grid.png", DOCS / "text.png")
            shown = ("seed", "ink_measured", "prior", "target", "ctrl", "classifier", "seconds")
            print_json(data={**{name: row[name] for name in shown}, "gap_nats": row["certificate"]["gap_nats"]})


if __name__ == "__main__":
    main()
