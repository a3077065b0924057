"""Print SHA-256 hashes of results, to compare before and after a change that must not change them.

python bench/fingerprint.py [demo] [testbed] [families]     (all three take some minutes)

demo      weights and samples of `ctrl demo --quick`
testbed   the rows of `ctrl exact --quick` without their seconds
families  weights and samples of a tiny training on a pipeline of every family, with all learners
"""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
SETTINGS = {
    "control": "dark", "classifier": {"updates": 60, "grid": 1, "depth": 1, "head": "categorical"},
    "learners": ["weighted", "adjoint", "backprop", "ppo"],
    "weighted": {"updates": 3, "batch": 4, "cache": 8, "renoising": 2}, "adjoint": {"updates": 3, "batch": 4},
    "backprop": {"updates": 2, "batch": 4}, "ppo": {"updates": 3, "batch": 4}, "steps": 3, "rank": 2,
    "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8},
}  # fmt: skip


def ctrl(*arguments: object) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-m", "ctrl_diffusion", *map(str, arguments)], check=True)


def digest(*paths: Path) -> str:
    """Return the hash of files' bytes, in the order of their names."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:16]


def show_run(name: str, run: Path) -> None:
    """Print the hashes of a run folder."""
    print(f"{name:10} controls    {digest(*(run / 'control').rglob('*.safetensors'))}")
    print(f"{name:10} classifiers {digest(*(run / 'classifier').rglob('*.safetensors'))}")
    print(f"{name:10} samples     {digest(*(run / 'samples').rglob('*.png'))}", flush=True)


def show_demo(folder: Path) -> None:
    ctrl("demo", "--quick", "--quiet", "--out", folder / "demo")
    show_run("demo", folder / "demo")


def show_testbed(folder: Path) -> None:
    ctrl("exact", "--quick", "--quiet", "--out", folder / "exact")
    rows = json.loads((folder / "exact" / "exact.json").read_text())["rows"]
    values = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    print(f"testbed    rows        {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]}", flush=True)


def show_families(folder: Path) -> None:
    from pipelines import BUILDERS, LARGE, saved

    warnings.simplefilter("ignore")

    torch.manual_seed(0)
    data, draw = folder / "photos", np.random.default_rng(0)
    data.mkdir()
    rows = ["file_name,dark"]
    for i in range(60):
        pixels = 128 + 60 * (-1) ** (i % 2) + draw.normal(0, 12, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data / f"{i:02}.png")
        rows.append(f"{i:02}.png,{('no', 'yes')[i % 2]}")
    (data / "metadata.csv").write_text("\n".join(rows) + "\n")
    for name in BUILDERS:
        prior, run = folder / name / "prior", folder / name / "run"
        saved(name, prior)
        settings = {**SETTINGS, "prior": str(prior), "data": str(data), "size": [32, 48] if name in LARGE else None}
        if name == "DDPM":
            settings["data"] = str(small(data))
        elif name != "DiT":
            settings["prompts"] = ["a seven", "two"]
        config = folder / name / "settings.yaml"
        config.write_text(yaml.safe_dump(settings))
        ctrl("train", "--config", config, "--out", run, "--quiet")
        show_run(name, run)


def small(data: Path) -> Path:
    """Write the images at 8 × 8 pixels and return their folder."""
    folder = data.parent / "small"
    folder.mkdir(exist_ok=True)
    for path in data.glob("*.png"):
        Image.open(path).resize((8, 8)).save(folder / path.name)
    (folder / "metadata.csv").write_text((data / "metadata.csv").read_text())
    return folder


def main() -> None:
    parts = {"demo": show_demo, "testbed": show_testbed, "families": show_families}
    for name in sys.argv[1:] or parts:
        with TemporaryDirectory() as folder:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
