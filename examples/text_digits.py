"""Make a text-to-image pipeline to try the commands on, and labelled images for it.

python examples/text_digits.py --out text-digits        (six minutes of a processor)
ctrl train --prior text-digits/pipeline --data text-digits/photos --control ink --condition prompt --out runs/text

With diffusers and transformers alone scikit-learn's digits, enlarged to 16 × 16, become a Stable Diffusion of prompts
like "a handwritten seven": an autoencoder to latents of 4 × 8 × 8, then a UNet on them (v-prediction) trained together
with CLIP's text encoder. The labelled images are an imagefolder of 500 digits the pipeline never saw; their ink, 1
(light) … 4 (heavy), is the quarter their mean pixel is in.
"""

import argparse
import csv
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten {name}" for name in NAMES)
LONGEST = 24  # tokens of a prompt, one a letter
PHOTOS = 500
BATCH, RATE = 64, 2e-3
WITHOUT_PROMPT = 0.1  # for classifier-free guidance


def digits() -> tuple[Tensor, Tensor]:
    """Return x (1797, 1, 16, 16) in [−1, 1], white ink on black, and c (1797,) in 0 … 9."""
    x, c = load_digits(return_X_y=True)
    small = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(small, scale_factor=2, mode="bilinear"), torch.tensor(c)


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift x slightly: some hundred digits alone would be memorised."""
    plan = torch.eye(2, 3) + torch.tensor([0.05, 0.05, 0.04]) * torch.randn(len(x), 2, 3, generator=generator)
    grid = F.affine_grid(plan, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # outside is black


def optimised(
    parameters: list[nn.Parameter], updates: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """Make AdamW and the cycle of its learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=updates)


def train_autoencoder(x: Tensor, updates: int, generator: torch.Generator) -> AutoencoderKL:
    """Train an autoencoder to half the pixels a side, with latents of unit variance."""
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    optimizer, cycle = optimised(list(vae.parameters()), updates)
    for _ in track(range(updates), description="training the autoencoder", transient=True):
        image = moved(x[torch.randint(len(x), (BATCH,), generator=generator)], generator)
        latent = vae.encode(image).latent_dist
        again = vae.decode(latent.sample(generator)).sample
        loss = (again - image).square().flatten(1).sum(1).mean() + 0.001 * latent.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 10.0)
        optimizer.step()
        cycle.step()
    vae.eval()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=float(1 / vae.encode(x).latent_dist.mode().std()))
    return vae


def text_parts() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Make a tokenizer of one token a letter, and an encoder with random weights."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {name: i for i, name in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(letters), len(letters) + 1
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LONGEST, bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LONGEST), CLIPTextModel(config)


def train_pipeline(folder: Path, x: Tensor, c: Tensor, of_autoencoder: int, updates: int) -> None:
    """Train a Stable Diffusion pipeline from scratch and save it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = train_autoencoder(x, of_autoencoder, generator)
    tokenizer, encoder = text_parts()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 48), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None, cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip
    tokens = tokenizer([*PROMPTS, ""], padding="max_length", max_length=LONGEST, return_tensors="pt").input_ids
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer, cycle = optimised(parameters, updates)
    for _ in track(range(updates), description="training the pipeline", transient=True):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        with torch.no_grad():
            latents = vae.encode(moved(x[rows], generator)).latent_dist.mode() * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        # stratified over time: the loss of a small batch is less noisy
        t = ((torch.arange(BATCH) + torch.rand(1, generator=generator)) / BATCH * 1000).long().clamp(max=999)
        prompt = torch.where(torch.rand(BATCH, generator=generator) < WITHOUT_PROMPT, len(PROMPTS), c[rows])
        v = unet(scheduler.add_noise(latents, noise, t), t, encoder(tokens).last_hidden_state[prompt]).sample
        loss = F.mse_loss(v, scheduler.get_velocity(latents, noise, t))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        cycle.step()
    StableDiffusionPipeline(
        vae=vae, text_encoder=encoder.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def write_photos(folder: Path, x: Tensor, c: Tensor) -> None:
    """Write labelled images as a user would bring them."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = ((x[:, 0] + 1) * 127.5).round().to(torch.uint8)
    weight = pixels.double().mean((1, 2))
    y = torch.bucketize(weight, torch.quantile(weight, torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)))
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "prompt", "ink"])
        for i, picture in enumerate(pixels):
            Image.fromarray(picture.numpy()).save(folder / f"{i}.png")
            table.writerow([f"{i}.png", PROMPTS[c[i]], int(y[i]) + 1])


def main() -> None:
    """Train the pipeline on most digits, then write the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("text-digits"), help="the folder for pipeline/ and photos/")
    parser.add_argument("--autoencoder", type=int, default=300, help="updates of the autoencoder's training")
    parser.add_argument("--updates", type=int, default=2000, help="of the UNet's and the text encoder's training")
    args = parser.parse_args()
    x, c = digits()
    known, others = train_test_split(range(len(x)), test_size=PHOTOS, stratify=c, random_state=0)
    train_pipeline(args.out / "pipeline", x[known], c[known], args.autoencoder, args.updates)
    write_photos(args.out / "photos", x[others], c[others])


if __name__ == "__main__":
    main()
