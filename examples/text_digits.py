"""Make a text-to-image pipeline to try the commands on, and labelled images for it.

python examples/text_digits.py --out text-digits             (six minutes of a processor)
python examples/text_digits.py --digits 2 --out two-digits   (ten minutes)
ctrl train --prior text-digits/pipeline --data text-digits/photos --control ink --condition prompt --out runs/text

With diffusers and transformers (5 or later) scikit-learn's digits, enlarged to 16 × 16, become a Stable Diffusion of
prompts like "a handwritten seven": an autoencoder to latents of 4 × 8 × 8, then a UNet on them (v-prediction) trained
together with CLIP's text encoder. The labelled images are an imagefolder of 500 digits the pipeline never saw; their
ink, 1 (light) … 4 (heavy), is the quarter their mean pixel is in.

With --digits 2 the pictures are 16 × 32 and show two digits side by side, the numbers 00 … 99, and the hundred prompts
name them as they are spoken: "a handwritten forty two", "a handwritten forty", "a handwritten twelve"; below ten the
zero is said too, "a handwritten zero seven". The pipeline is trained on all of them. The labelled images are five of
each, their ink that of both digits together, and prompts.txt lists the prompts in random order.
"""

import argparse
import csv
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
PHOTOS = 500
BATCH, RATE = 64, 2e-3
WITHOUT_PROMPT = 0.1  # for classifier-free guidance


def spoken(number: int) -> str:
    """Name a number of two digits, the zero of 00 … 09 too."""
    tens, units = divmod(number, 10)
    if tens == 0:
        return f"zero {NAMES[units]}"
    if tens == 1:
        return TEENS[units]
    return f"{TENS[tens - 2]} {NAMES[units]}" if units else TENS[tens - 2]


@dataclass(frozen=True)
class Size:
    """Describe a pipeline by its prompts, one a number, and what they need.

    Args:
        digits: of a number; a picture is 16 × 16 for each.
        names: the numbers' names, from zero.
        longest: tokens of a prompt, one a letter.
    """

    digits: int
    names: tuple[str, ...]
    longest: int

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(f"a handwritten {name}" for name in self.names)


SIZES = {1: Size(1, NAMES, 24), 2: Size(2, tuple(map(spoken, range(100))), 28)}


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


def side_by_side(x: Tensor, c: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Join every `count` digits to a picture, (n · count, 1, 16, 16) to (n, 1, 16, 16 · count), and to a number."""
    pictures = x.view(-1, count, *x.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3)
    places = 10 ** torch.arange(count - 1, -1, -1)
    return pictures, (c.view(-1, count) * places).sum(1)


def drawn(x: Tensor, c: Tensor, n: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n pictures of `count` random digits, each moved by itself, and their numbers."""
    rows = torch.randint(len(x), (n * count,), generator=generator)
    return side_by_side(moved(x[rows], generator), c[rows], count)


def optimised(
    parameters: list[nn.Parameter], updates: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """Make AdamW and the cycle of its learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=updates)


def train_autoencoder(x: Tensor, c: Tensor, count: int, updates: int, generator: torch.Generator) -> AutoencoderKL:
    """Train an autoencoder to half the pixels a side, with latents of unit variance."""
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    optimizer, cycle = optimised(list(vae.parameters()), updates)
    for _ in track(range(updates), description="training the autoencoder", transient=True):
        image, _ = drawn(x, c, BATCH // count, count, generator)
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
        whole = len(x) // count * count
        pictures, _ = side_by_side(x[:whole], c[:whole], count)
        vae.register_to_config(scaling_factor=float(1 / vae.encode(pictures).latent_dist.mode().std()))
    return vae


def text_parts(longest: int) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Make a tokenizer of one token a letter, and an encoder with random weights."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {name: i for i, name in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(letters), len(letters) + 1
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=longest, bos_token_id=start, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=longest), CLIPTextModel(config)


def train_pipeline(folder: Path, size: Size, x: Tensor, c: Tensor, of_autoencoder: int, updates: int) -> None:
    """Train a Stable Diffusion pipeline from scratch and save it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = train_autoencoder(x, c, size.digits, of_autoencoder, generator)
    tokenizer, encoder = text_parts(size.longest)
    unet = UNet2DConditionModel(
        sample_size=8 if size.digits == 1 else (8, 8 * size.digits), in_channels=4, out_channels=4,
        block_out_channels=(16, 48), layers_per_block=1, mid_block_type=None,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip
    tokens = tokenizer(
        [*size.prompts, ""], padding="max_length", max_length=size.longest, return_tensors="pt"
    ).input_ids
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer, cycle = optimised(parameters, updates)
    for _ in track(range(updates), description="training the pipeline", transient=True):
        image, number = drawn(x, c, BATCH, size.digits, generator)
        with torch.no_grad():
            latents = vae.encode(image).latent_dist.mode() * vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        # stratified over time: the loss of a small batch is less noisy
        t = ((torch.arange(BATCH) + torch.rand(1, generator=generator)) / BATCH * 1000).long().clamp(max=999)
        prompt = torch.where(torch.rand(BATCH, generator=generator) < WITHOUT_PROMPT, len(tokens) - 1, number)
        v = unet(scheduler.add_noise(latents, noise, t), t, encoder(tokens).last_hidden_state[prompt]).sample
        loss = F.mse_loss(v, scheduler.get_velocity(latents, noise, t))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        cycle.step()
    diffusers.StableDiffusionPipeline(  # imported here, after main() asked for no advice on torchvision
        vae=vae, text_encoder=encoder.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def photo_rows(c: Tensor, generator: torch.Generator) -> Tensor:
    """Choose the digits (500, 2) of five pictures of every number; each digit is left and right in about one."""
    number = torch.arange(PHOTOS) % 100
    rows = torch.empty(PHOTOS, 2, dtype=torch.long)
    for place, wanted in enumerate((number // 10, number % 10)):
        for k in range(10):
            places, pool = (wanted == k).nonzero()[:, 0], (c == k).nonzero()[:, 0]
            order = torch.randperm(len(pool), generator=generator)
            rows[places, place] = pool[order[torch.arange(len(places)) % len(pool)]]
    return rows


def write_photos(folder: Path, prompts: Sequence[str], x: Tensor, number: Tensor) -> None:
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
            table.writerow([f"{i}.png", prompts[number[i]], int(y[i]) + 1])


def main() -> None:
    """Train the pipeline on most digits, then write labelled images of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder for pipeline/ and photos/: text-digits or two-digits")
    parser.add_argument("--digits", type=int, choices=SIZES, default=1, help="of the numbers")
    parser.add_argument("--autoencoder", type=int, default=300, help="updates of the autoencoder's training")
    parser.add_argument("--updates", type=int, default=2000, help="of the UNet's and the text encoder's training")
    args = parser.parse_args()
    if int(transformers.__version__.partition(".")[0]) < 5:
        parser.error(f"transformers {transformers.__version__} makes no tokenizer without files. Install version 5.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size, folder = SIZES[args.digits], args.out or Path("text-digits" if args.digits == 1 else "two-digits")
    x, c = digits()
    known, others = train_test_split(range(len(x)), test_size=PHOTOS, stratify=c, random_state=0)
    train_pipeline(folder / "pipeline", size, x[known], c[known], args.autoencoder, args.updates)
    x, c = x[others], c[others]
    if size.digits == 2:
        rows = photo_rows(c, torch.Generator().manual_seed(0)).flatten()
        x, c = side_by_side(x[rows], c[rows], 2)
        shuffled = random.Random(0).sample(size.prompts, len(size.prompts))
        (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in shuffled), encoding="utf-8")
    write_photos(folder / "photos", size.prompts, x, c)


if __name__ == "__main__":
    main()
