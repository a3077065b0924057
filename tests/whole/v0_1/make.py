"""Make the files beside this one, by version 0.1: runs, a classifier, an export, and the samples they give.

Run it in a checkout of the last commit of version 0.1 (8f51219), with its src/ on PYTHONPATH: python make.py OUT
"""

import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from ctrl_diffusion.config import ControlSettings
from ctrl_diffusion.export import export
from ctrl_diffusion.job import classifier_job, demo_job, resume_job, train_job
from ctrl_diffusion.judges import Judges
from ctrl_diffusion.progress import Interrupted
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from ctrl_diffusion.run import Run

sys.path.insert(0, "tests")
from pipelines import saved

SETTINGS = {
    "classifier": {"updates": 150, "head": "ordinal", "grid": 1, "depth": 1},
    "learners": ["weighted", "backprop", "ppo", "adjoint"],
    "weighted": {"updates": 6, "batch": 16, "cache": 8, "renoising": 4},
    "backprop": {"updates": 3, "batch": 8},
    "ppo": {"updates": 6, "batch": 8, "reuse": 2},
    "adjoint": {"updates": 6, "batch": 8, "reuse": 2},
    "evaluation": {"prior_samples": 8, "paths": 80, "probes": 2, "sweep_paths": 80},
    "steps": 4, "rank": 2, "checkpoint": 2,
}  # fmt: skip
DARK = {
    "control": "dark", "classifier": {"updates": 60, "grid": 1, "depth": 1, "head": "categorical"},
    "learners": ["weighted"], "weighted": {"updates": 3, "batch": 4, "cache": 8, "renoising": 2}, "steps": 3, "rank": 2,
    "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8},
}  # fmt: skip
Y, C = torch.arange(8) % 4, torch.arange(8)
updates = 0


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def interrupting(what: str, total: int):
    """A progress bar that interrupts the training in the middle of ppo."""

    def advance(n: int = 1, note: str = "") -> None:
        global updates
        updates += n if what == "learner: ppo" else 0
        if updates >= 4:
            raise KeyboardInterrupt

    return advance


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out, expected = Path(sys.argv[1]), {}
    demo_job(SETTINGS, out / "run")
    run = Run.load(out / "run")
    expected["run"] = run.sample(y=Y, c=C, generator=seeded())
    expected["run.strength"] = run.sample(y=Y, c=C, generator=seeded(), strength=1.5)
    try:
        demo_job(SETTINGS, out / "interrupted", phase=interrupting)
    except Interrupted:
        shutil.copytree(out / "interrupted", out / "resumed")
    resume_job(out / "resumed")
    expected["resumed"] = Run.load(out / "resumed").sample(y=Y, c=C, generator=seeded())
    control = load_file(out / "resumed" / "control" / "control.safetensors")
    expected |= {f"resumed.{name}": value for name, value in control.items()}
    shutil.copy(out / "resumed" / "metrics.json", out / "resumed-metrics.json")
    labelled = {"name": "ink", "data": str(out / "run" / "data"), "classifier": {"updates": 100, "grid": 1, "depth": 1}}
    classifier_job(ControlSettings.of(labelled), out / "classifier")
    judges, x = Judges.load(out / "classifier"), torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
    expected["classifier"] = judges.classifier.log_prob(x)
    expected["classifier.judge"] = judges.judge.log_prob(x)
    saved("DDPM", out / "prior")
    photos, draw, rows = out / "photos", np.random.default_rng(0), ["file_name,dark"]
    photos.mkdir()
    for i in range(60):
        pixels = (128 + 60 * (-1) ** (i % 2) + draw.normal(0, 12, (8, 8, 3))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(photos / f"{i:02}.png")
        rows.append(f"{i:02}.png,{('no', 'yes')[i % 2]}")
    (photos / "metadata.csv").write_text("\n".join(rows) + "\n")
    train_job({"prior": str(out / "prior"), "data": str(photos), **DARK}, out / "dark")
    export(out / "dark", out / "export")
    pipeline = DiffusionPipeline.from_pretrained(str(out / "export"), trust_remote_code=True)
    pictures = pipeline(controls={"dark": "yes"}, num_images_per_prompt=4, generator=seeded(), output_type="pt")
    expected["export"] = pictures.images
    save_file({name: value.contiguous() for name, value in expected.items()}, out / "expected.safetensors")
    # data, samples and pictures were removed afterwards, to keep the repository small


if __name__ == "__main__":
    main()
