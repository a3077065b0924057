"""Rebuild the embedded prior: `python bench/build_digits.py` (about a quarter of an hour, one thread).

A class-conditional DiT (c = digit, null class = 10) on scikit-learn's 8×8 handwritten digits, v-prediction under the
squared-cosine schedule (Nichol & Dhariwal 2021; Salimans & Ho 2022), saved as an ordinary diffusers pipeline folder.
300 digits, stratified, are never shown to it: they measure how it generalises.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from diffusers.training_utils import EMAModel
from embedded import new_scheduler, pixel_dit
from rich.progress import track
from torch import Tensor

from ctrl_diffusion.data.digits import digits, split
from ctrl_diffusion.prior.source import DIGITS

NULL_CLASS, UNLABELLED = 10, 0.4  # p(x) is harder than p(x | c): it gets many of the examples


def warp(x: Tensor) -> Tensor:
    """Small random rotation, scale, shear and shift of 70 % of the images: 1,497 digits alone are memorised."""
    n = len(x)
    angle, scale = 0.05 * torch.randn(n), torch.exp(0.03 * torch.randn(n, 2))
    shear, shift = 0.05 * torch.randn(n), 0.03 * torch.randn(n, 2)
    rows = [
        torch.stack([angle.cos() * scale[:, 0], shear - angle.sin(), shift[:, 0]], dim=1),
        torch.stack([angle.sin(), angle.cos() * scale[:, 1], shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    warped = F.grid_sample(x + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2) - 1
    return torch.where(torch.rand(n, 1, 1, 1) < 0.3, x, warped)


def train(steps: int, batch: int = 128, lr: float = 2e-3) -> DiTPipeline:
    """Train the prior from seed 0 and return the pipeline with the averaged weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, c = (a[split()[0]] for a in digits())
    net, scheduler = pixel_dit(side=8, classes=10, heads=4, layers=4), new_scheduler()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.99))
    ema = EMAModel(net.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    for i in track(range(steps), description="training the digits prior"):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, i / 200) * 0.5 * (1 + math.cos(math.pi * i / steps))
        rows = torch.randint(0, len(x), (batch,))
        labels = torch.where(torch.rand(batch) < UNLABELLED, NULL_CLASS, c[rows])
        x_0, noise = warp(x[rows]), torch.randn(batch, *x.shape[1:])
        # stratified over time: the loss of a small batch is far less noisy
        t = ((torch.arange(batch) + torch.rand(1)) / batch * 1000).long().clamp(max=999)
        v = net(scheduler.add_noise(x_0, noise, t), t, class_labels=labels).sample
        loss = F.mse_loss(v, scheduler.get_velocity(x_0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        ema.step(net.parameters())
    ema.copy_to(net.parameters())
    return DiTPipeline(transformer=net.eval(), vae=None, scheduler=scheduler)


def main() -> None:
    """Command line: train, then write the pipeline folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DIGITS, help="the pipeline folder to write")
    parser.add_argument("--steps", type=int, default=18_000)
    args = parser.parse_args()
    train(args.steps).save_pretrained(args.out)


if __name__ == "__main__":
    main()
