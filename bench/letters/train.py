"""Train the letters prior in rounds: each goes on from the weights of the one before, with a seed of its own."""

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from embedded import new_scheduler, pixel_dit
from torch import Tensor, nn

from ctrl_diffusion.data.letters.rulers import CHARACTERS, SIDE

CLASSES = len(CHARACTERS)
UNLABELLED = 0.12  # share of the examples that have the null class instead of theirs
WATCHED, EVERY = 512, 300  # held-out glyphs; seconds between checkpoints


@dataclass(frozen=True)
class Round:
    """Describe one round of training."""

    steps: int
    lr: float = 1e-3
    batch: int = 64
    seed: int = 0
    warm_up: int = 200
    muon: bool = False  # for the matrices of the blocks, in place of AdamW
    bfloat16: bool = False  # autocast of the network


ROUNDS = (
    Round(steps=6500, lr=1.2e-3),
    Round(steps=9500, lr=1e-3, seed=1, muon=True, bfloat16=True),
)


def new_network() -> DiTTransformer2DModel:
    """Make the network: a DiT on pixels whose blocks begin as the identity."""
    net = pixel_dit(side=SIDE, classes=CLASSES, heads=6, layers=6)
    for layer in (*(block.norm1.linear for block in net.transformer_blocks), net.proj_out_1, net.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


class Glyphs:
    """Hold the glyphs (n, 62, 32, 32) of faces, and draw batches of them; large families are drawn less often."""

    def __init__(self, glyphs: np.ndarray, family: np.ndarray) -> None:
        self.glyphs = torch.from_numpy(glyphs)
        size = torch.from_numpy(np.bincount(family)[family]).double()
        self.weight = size**-0.5

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw x (count, 1, 32, 32) in [−1, 1] and their classes (count,)."""
        face = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        c = torch.randint(0, CLASSES, (count,), generator=generator)
        return self.glyphs[face, c].float().unsqueeze(1) / 127.5 - 1, c


def times_of(count: int, generator: torch.Generator) -> Tensor:
    """Draw times stratified over 0 … 999: the loss of a small batch is far less noisy."""
    return ((torch.arange(count) + torch.rand(1, generator=generator)) / count * 1000).long().clamp(max=999)


def loss_of(net: nn.Module, scheduler: DDPMScheduler, x_0: Tensor, c: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean squared error of v on a batch, each example at a time and with noise of its own."""
    noise, t = torch.randn(x_0.shape, generator=generator), times_of(len(x_0), generator)
    v = net(scheduler.add_noise(x_0, noise, t), t, class_labels=c).sample
    return F.mse_loss(v, scheduler.get_velocity(x_0, noise, t))


def learning_rate(part: Round, step: int) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down to zero."""
    return part.lr * min(1.0, (step + 1) / part.warm_up) * 0.5 * (1 + math.cos(math.pi * step / part.steps))


def optimizers_of(net: nn.Module, part: Round) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a round: Muon for the matrices of the blocks if it says so, AdamW for all else."""
    named = dict(net.named_parameters())
    inside = [name for name, p in named.items() if p.ndim == 2 and "blocks" in name and "emb" not in name]
    matrices = [named.pop(name) for name in inside if part.muon]
    adamw = torch.optim.AdamW(named.values(), part.lr, (0.9, 0.99), weight_decay=0.01, fused=True)
    if not part.muon:
        return [adamw]
    # its steps are as large as AdamW's, so that one learning rate serves both
    return [torch.optim.Muon(matrices, part.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), adamw]


class Training:
    """Hold what a round changes: weights, their average, the optimizers' state and the random stream."""

    def __init__(self, net: nn.Module, part: Round) -> None:
        self.net, self.part, self.step, self.seconds = net, part, 0, 0.0
        self.generator = torch.Generator().manual_seed(part.seed)
        self.optimizers = optimizers_of(net, part)
        self.ema = EMAModel(net.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
        self.scheduler = new_scheduler()

    def update(self, data: Glyphs) -> float:
        """Take one step and return its loss."""
        part, generator = self.part, self.generator
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(part, self.step)
            optimizer.zero_grad()
        x_0, c = data.batch(part.batch, generator)
        c = torch.where(torch.rand(part.batch, generator=generator) < UNLABELLED, CLASSES, c)
        with torch.autocast("cpu", torch.bfloat16, enabled=part.bfloat16):
            loss = loss_of(self.net, self.scheduler, x_0, c, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.step(self.net.parameters())
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write all of it, whole."""
        state = {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a file that was saved."""
        state = torch.load(path, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, of_it in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(of_it)
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]


@torch.no_grad()
def watched_loss(training: Training, held_out: Glyphs) -> float:
    """Return the loss of the averaged weights on held-out glyphs, the same ones with the same noise each time."""
    generator = torch.Generator().manual_seed(0)
    x_0, c = held_out.batch(WATCHED, generator)
    training.ema.store(training.net.parameters())
    training.ema.copy_to(training.net.parameters())
    loss = float(loss_of(training.net, training.scheduler, x_0, c, generator))
    training.ema.restore(training.net.parameters())
    return loss


def train_round(
    net: nn.Module, part: Round, data: Glyphs, held_out: Glyphs, checkpoint: Path
) -> tuple[nn.Module, dict[str, float]]:
    """Do a round, or the rest of one whose checkpoint is there.

    Returns the network with the averaged weights, and the minutes it took and the loss on held-out glyphs.
    """
    training = Training(net, part)
    if checkpoint.is_file():
        training.load(checkpoint)
        print(f"train: going on from step {training.step} of {part.steps}")
    start, written, recent = time.perf_counter() - training.seconds, time.perf_counter(), []
    while training.step < part.steps:
        recent.append(training.update(data))
        if time.perf_counter() - written > EVERY or training.step == part.steps:
            written = time.perf_counter()
            training.seconds = written - start
            training.save(checkpoint)
            minutes, held = training.seconds / 60, watched_loss(training, held_out)
            where = f"step {training.step} of {part.steps}, {minutes:.1f} min"
            print(f"train: {where}, loss {np.mean(recent):.4f}, held out {held:.4f}", flush=True)
            recent = []
    minutes, held = training.seconds / 60, watched_loss(training, held_out)
    training.ema.copy_to(net.parameters())
    return net.eval(), {"minutes": round(minutes, 1), "held_out_loss": held}


def load_network(folder: Path) -> DiTTransformer2DModel:
    """Read the network of a pipeline folder, in full precision."""
    return DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()


def save_pipeline(net: DiTTransformer2DModel, folder: Path) -> None:
    """Write the pipeline folder, the weights in half precision; the network stays as it is."""
    half = copy.deepcopy(net).half()
    DiTPipeline(transformer=half, vae=None, scheduler=new_scheduler()).save_pretrained(folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    names = {str(number): character for number, character in enumerate(CHARACTERS)}
    path.write_text(json.dumps({**index, "id2label": names}, indent=2) + "\n", encoding="utf-8")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)  # where the round before was read from
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
