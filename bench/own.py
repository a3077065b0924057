"""A stranger's pipeline through the commands classifier, train, sample and evaluate (`make bench`).

The pipeline is trained here with diffusers alone: a UNet on 16 × 12 colour textures (rows, columns, checks),
v-prediction, unconditional. 300 labelled images, default settings. Writes docs/own.json and docs/own.png.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from rich import print_json
from rich.progress import track
from torch import Tensor

from ctrl_diffusion.files import write_json

DOCS = Path(__file__).parent.parent / "docs"
HEIGHT, WIDTH = 16, 12
NAMES = ("rows", "columns", "checks")
BRIGHT = torch.tensor([[1.0, -0.6, -0.6], [-0.6, 0.9, -0.6], [-0.4, -0.2, 1.0]])


def textures(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (n, 3, 16, 12) in [−1, 1] and the texture (n,): two-pixel stripes or squares in one of three colours."""
    y, colour = torch.randint(3, (2, n), generator=generator)
    down, right = torch.randint(4, (2, n, 1, 1), generator=generator)
    rows = ((torch.arange(HEIGHT).view(1, -1, 1) + down) // 2 % 2).expand(n, HEIGHT, WIDTH)
    columns = ((torch.arange(WIDTH).view(1, 1, -1) + right) // 2 % 2).expand(n, HEIGHT, WIDTH)
    lit = torch.stack([rows, columns, (rows + columns) % 2])[y, torch.arange(n)][:, None].float()
    x = lit * BRIGHT[colour][:, :, None, None] - 0.8 * (1 - lit)
    return (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(-1, 1), y


def train_pipeline(folder: Path, updates: int, widths: tuple[int, int] = (32, 64)) -> None:
    """Train a DDPM pipeline from scratch and save it, with diffusers alone."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = UNet2DModel(
        sample_size=(HEIGHT, WIDTH), in_channels=3, out_channels=3, block_out_channels=widths, layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=updates)
    for _ in track(range(updates), description="training the pipeline", transient=True):
        x_0, _ = textures(64, generator)
        noise, t = torch.randn(x_0.shape, generator=generator), torch.randint(1000, (64,), generator=generator)
        v = network(scheduler.add_noise(x_0, noise, t), t).sample
        loss = F.mse_loss(v, scheduler.get_velocity(x_0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    DDPMPipeline(network.eval(), scheduler).save_pretrained(folder)


def write_photos(folder: Path, n: int) -> None:
    """n labelled images as a user would bring them."""
    folder.mkdir(parents=True)
    x, y = textures(n, torch.Generator().manual_seed(1))
    pixels = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "texture"])
        for i in range(n):
            Image.fromarray(pixels[i]).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", NAMES[y[i]]])


def ctrl(*arguments: object) -> None:
    """Run a command as a user does."""
    subprocess.run([sys.executable, "-m", "ctrl_diffusion.cli", *map(str, arguments)], check=True)


def main() -> None:
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        train_pipeline(root / "pipeline", updates=1000)
        write_photos(root / "photos", 300)
        fitted, run = root / "classifier", root / "run"
        own = ("--control", "texture", "--prior", root / "pipeline")
        ctrl("classifier", root / "photos", *own, "--out", fitted)
        ctrl("train", "--data", root / "photos", *own, "--classifier", fitted, "--out", run)
        ctrl("sample", run, "--set", "texture=checks", "-n", 16, "--out", root / "checks")
        ctrl("evaluate", run, "-n", 600, "--out", root / "figures.json")
        metrics = json.loads((run / "metrics.json").read_text())
        del metrics["versions"]
        metrics["evaluated_again"] = json.loads((root / "figures.json").read_text())["ctrl"]["accuracy"]
        write_json(DOCS / "own.json", metrics)
        shutil.copy(run / "grid.png", DOCS / "own.png")
        shown = {name: metrics[name] for name in ("prior", "target", "ctrl", "classifier", "seconds")}
        print_json(data={**shown, "gap_nats": metrics["certificate"]["gap_nats"]})


if __name__ == "__main__":
    main()
