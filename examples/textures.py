"""Make something to try the commands on: a pipeline nobody has seen, and labelled images for it.

python examples/textures.py --out textures        (a few minutes)
ctrl train --prior textures/pipeline --data textures/photos --control texture --out runs/texture

The pipeline is trained with diffusers alone: a UNet on 16 × 12 colour textures (rows, columns, checks), v-prediction,
unconditional. The 300 labelled images are an imagefolder.
"""

import argparse
import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from rich.progress import track
from torch import Tensor

HEIGHT, WIDTH = 16, 12
NAMES = ("rows", "columns", "checks")
BRIGHT = torch.tensor([[1.0, -0.6, -0.6], [-0.6, 0.9, -0.6], [-0.4, -0.2, 1.0]])


def textures(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw x (n, 3, 16, 12) in [−1, 1] and the texture (n,): two-pixel stripes or squares in one of three colours."""
    y, colour = torch.randint(3, (2, n), generator=generator)
    down, right = torch.randint(4, (2, n, 1, 1), generator=generator)
    rows = ((torch.arange(HEIGHT).view(1, -1, 1) + down) // 2 % 2).expand(n, HEIGHT, WIDTH)
    columns = ((torch.arange(WIDTH).view(1, 1, -1) + right) // 2 % 2).expand(n, HEIGHT, WIDTH)
    lit = torch.stack([rows, columns, (rows + columns) % 2])[y, torch.arange(n)][:, None].float()
    x = lit * BRIGHT[colour][:, :, None, None] - 0.8 * (1 - lit)
    return (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(-1, 1), y


def train_pipeline(folder: Path, updates: int, width: int) -> None:
    """Train a DDPM pipeline from scratch and save it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = UNet2DModel(
        sample_size=(HEIGHT, WIDTH), in_channels=3, out_channels=3,
        block_out_channels=(width, 2 * width), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
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
    """Write n labelled images as a user would bring them."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y = textures(n, torch.Generator().manual_seed(1))
    pixels = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "texture"])
        for i in range(n):
            Image.fromarray(pixels[i]).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", NAMES[y[i]]])


def main() -> None:
    """Train the pipeline, then draw the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("textures"), help="the folder for pipeline/ and photos/")
    parser.add_argument("--updates", type=int, default=1000, help="of the pipeline's training")
    parser.add_argument("--width", type=int, default=32, help="channels of its first level")
    args = parser.parse_args()
    train_pipeline(args.out / "pipeline", args.updates, args.width)
    write_photos(args.out / "photos", 300)


if __name__ == "__main__":
    main()
