"""Measure the example of two digits: are its hundred prompts drawn, left and right in their places?

python bench/two_digits.py --work runs/two-digits     (ten minutes for the example, two more)

A reader of single digits, an SVM fitted on the digits the pipeline was trained on and moved as they were, reads the
left and the right half of a picture. It is measured on the labelled images, which show digits neither has seen. Samples
of all prompts come from the chain the controls are trained on, 20 steps, and from the saved pipeline as diffusers
samples it, 25 steps. Writes bench/results/two-digits.json, and docs/pictures/two-digits.png, a sample of the chain a
number.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence
import numpy as np
import torch
from evidence import PICTURES, ROOT
from PIL import Image
from rich import print_json
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from ctrl_diffusion.chain.noise import stream
from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.commands.app import quiet_dependencies
from ctrl_diffusion.data.labelled import save_image, to_pixels
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.run import Run, times_of

sys.path.insert(0, str(ROOT / "examples"))
from text_digits import PHOTOS, SIZES, digits, moved

PROMPTS = SIZES[2].prompts
GUIDANCE = 1.0  # none: the pipeline samples p(x | prompt) itself
EACH = 10  # samples of a prompt
HELD_OUT = 30
UPDATES = {"contrast": 1200, "adjoint": 300}  # at most; a third of the defaults
PIPELINE_STEPS = 25


def fit_reader(copies: int = 6) -> SVC:
    """Fit a classifier of single digits (n, 256) on the example's training digits and moved copies of them."""
    x, c = digits()
    known, _ = train_test_split(range(len(x)), test_size=PHOTOS, stratify=c, random_state=0)  # as the example does
    x, c = x[known], c[known]
    generator = torch.Generator().manual_seed(1)
    pictures = torch.cat([x, *(moved(x, generator) for _ in range(copies))])
    return SVC(C=10.0).fit(pictures.flatten(1).numpy(), c.repeat(copies + 1).numpy())


def read_numbers(reader: SVC, x: Tensor) -> Tensor:
    """Read numbers (n,) of two digits from pictures x (n, 1, 16, 32) in [−1, 1]."""
    left, right = (torch.from_numpy(reader.predict(half.flatten(1).numpy())) for half in x.chunk(2, -1))
    return 10 * left + right


def labelled(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the example's labelled images x (n, 1, 16, 32) in [−1, 1] and their numbers (n,)."""
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    pixels = np.stack([np.asarray(Image.open(folder / row["file_name"]), dtype=np.float32) for row in rows])
    return torch.from_numpy(pixels / 127.5 - 1)[:, None], torch.tensor([PROMPTS.index(row["prompt"]) for row in rows])


def agreement(number: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Return the shares of numbers and of digits read as wanted, and of those of two digits read the wrong way round.

    `worst` is the prompt least often read.
    """
    right = (number == wanted).double()
    swapped, two = number == wanted % 10 * 10 + wanted // 10, wanted // 10 != wanted % 10
    each = {int(k): float(right[wanted == k].mean()) for k in wanted.unique()}
    worst = min(each, key=each.__getitem__)
    return {
        "number": float(right.mean()),
        "left": float((number // 10 == wanted // 10).double().mean()),
        "right": float((number % 10 == wanted % 10).double().mean()),
        "swapped": float(swapped[two].double().mean()),
        "worst": {"prompt": PROMPTS[worst], "number": each[worst]},
    }


def chain_samples(folder: Path, wanted: Tensor, guidance: float = GUIDANCE) -> Tensor:
    """Sample pictures in [−1, 1] of numbers from the chain a control is trained on."""
    prior = Prior.from_pretrained(folder).with_prompts(PROMPTS, guidance)
    config = Config.from_values({"prior": str(folder), "control": "ink", "data": "-"})
    times = times_of(prior, config, config.steps)
    x_0 = paths(prior.denoiser, len(wanted), times, stream(0, "two digits"), {"c": wanted}).x_0
    return torch.cat([prior.decode(x) for x in x_0.split(100)]).clamp(-1, 1)


def pipeline_samples(folder: Path, wanted: Tensor, guidance: float = GUIDANCE) -> Tensor:
    """Sample pictures in [−1, 1] of numbers as diffusers does."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": guidance, "num_inference_steps": PIPELINE_STEPS, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    batches = [
        pipeline([PROMPTS[k] for k in part], generator=generator, **settings).images for part in wanted.split(100)
    ]
    return torch.cat(batches) * 2 - 1


def save_sheet(path: Path, x: Tensor) -> None:
    """Write a hundred pictures, three times as large, as ten rows of ten with gaps."""
    cells = np.pad(to_pixels(x).repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)), constant_values=255)
    save_image(path, np.concatenate([np.concatenate(list(row), 1) for row in np.split(cells, 10)], 0))


def ink_borders(x: Tensor) -> Tensor:
    """Return the three quartiles of the mean pixel of pictures: the borders of the ink's classes."""
    return torch.quantile(x.double().flatten(1).mean(1), torch.tensor([0.25, 0.5, 0.75], dtype=torch.double))


def ink_of(x: Tensor, borders: Tensor) -> Tensor:
    """Return the ink's class (n,) of pictures, 0 … 3."""
    return torch.bucketize(x.double().flatten(1).mean(1), borders)


def make_example(work: Path) -> None:
    """Run the example, unless its last file is there."""
    if not (work / "photos" / "metadata.csv").is_file():
        example = ROOT / "examples" / "text_digits.py"
        subprocess.run([sys.executable, example, "--digits", "2", "--out", work], check=True)


def measure_prior(work: Path) -> dict[str, Any]:
    """Read labelled images and samples, and count the ink of samples; write docs/pictures/two-digits.png."""
    reader, (x, number) = fit_reader(), labelled(work / "photos")
    wanted = torch.arange(100).repeat_interleave(EACH)
    chain, pipeline = (sample(work / "pipeline", wanted) for sample in (chain_samples, pipeline_samples))
    guided = pipeline_samples(work / "pipeline", wanted[::2], 2.0)
    save_sheet(PICTURES / "two-digits.png", chain[::EACH])
    return {
        "labelled_images": agreement(read_numbers(reader, x), number),
        "chain": agreement(read_numbers(reader, chain), wanted),
        "pipeline": agreement(read_numbers(reader, pipeline), wanted),
        "pipeline_at_guidance_2": agreement(read_numbers(reader, guided), wanted[::2]),
        "ink_shares": (ink_of(chain, ink_borders(x)).bincount(minlength=4) / len(wanted)).tolist(),
    }


def sampled(run: Run, prompts: Sequence[str], reader: SVC, borders: Tensor, each: int = 4) -> dict[str, float]:
    """Return the shares of samples, `each` for every prompt and ink, with the number and with the ink asked for."""
    c = torch.tensor([run.prior.number_of(prompt) for prompt in prompts]).repeat_interleave(4 * each)
    y = torch.arange(4).repeat_interleave(each).repeat(len(prompts))
    x = run.sample(y, c, generator=torch.Generator().manual_seed(3))
    wanted = torch.tensor([PROMPTS.index(prompt) for prompt in prompts]).repeat_interleave(4 * each)
    return {
        "samples": len(x),
        "number_read": float((read_numbers(reader, x) == wanted).double().mean()),
        "ink_measured": float((ink_of(x, borders) == y).double().mean()),
    }


def train_control(work: Path) -> dict[str, Any]:
    """Train ink on 70 prompts, and return what is certified and sampled of them and of the other 30."""
    command = [sys.executable, "-m", "ctrl_diffusion", "train", "--control", "ink", "--hold-out", str(HELD_OUT)]
    paths_of = {"prior": "pipeline", "data": "photos", "prompts": "prompts.txt", "out": "run"}
    command += [part for name, path in paths_of.items() for part in (f"--{name}", work / path)]
    settings = {"seed": 0, "guidance": GUIDANCE, **{f"{name}.updates": count for name, count in UPDATES.items()}}
    command += [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    subprocess.run([*command, "--quiet", "--overwrite"], check=True)
    metrics = json.loads((work / "run" / "metrics.json").read_text(encoding="utf-8"))
    groups, run = ("target", "ctrl", "certificate"), Run.load(work / "run")
    reader, borders, prompts = fit_reader(), ink_borders(labelled(work / "photos")[0]), run.prior.class_names
    trained, unseen = ([prompts[c] for c in part] for part in (run.split.trained, run.split.held_out))
    return {
        "settings": settings,
        "conditions": metrics["conditions"],
        "trained": {name: metrics[name] for name in groups} | sampled(run, trained, reader, borders),
        "held_out": {name: metrics["held_out"][name] for name in groups} | sampled(run, unseen, reader, borders),
        "training": metrics["training"],
        "seconds": metrics["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/two-digits"), help="the example's folder")
    parser.add_argument("--control", action="store_true", help="train a control, too, with prompts held out")
    args = parser.parse_args()
    quiet_dependencies()
    make_example(args.work)
    figures = evidence.read("two-digits", {})
    if args.control:
        figures |= {"control": train_control(args.work)}
    else:
        figures |= {"prior": measure_prior(args.work)}
    print_json(data=figures)
    evidence.write("two-digits", figures)


if __name__ == "__main__":
    main()
