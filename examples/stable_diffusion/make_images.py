"""Draw the images a control is learned from: samples of the prior itself, each with its prompt.

python make_images.py -n 1800 --out images

Plain diffusers: DDIM at η = 1, evenly spaced timesteps, as the paper's code samples. The folder is an imagefolder with
a metadata.csv of file_name and prompt; labels are not in it, the rules of the configs compute them. Image i has prompt
i modulo their number and the seed --seed + i, whatever the batch.
"""

import argparse
import csv
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from rich.progress import track

PRIOR = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HERE = Path(__file__).parent


def opened(prior: str) -> StableDiffusionPipeline:
    """Open the pipeline to sample as the paper does, on a GPU in half precision where there is one.

    The safety checker is left out: the black image it puts in a picture's place is a very small JPEG.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(
        prior, use_safetensors=True, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda", torch.float16) if torch.cuda.is_available() else pipeline


def write_images(folder: Path, pipeline: StableDiffusionPipeline, prompts: list[str], args: argparse.Namespace) -> None:
    """Write the imagefolder, its metadata.csv last, so that a folder without one is not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:05d}.png" for i in range(args.n)]
    asked = [prompts[i % len(prompts)] for i in range(args.n)]
    for start in track(range(0, args.n, args.batch), description="sampling"):
        rows = range(start, min(start + args.batch, args.n))
        drawn = pipeline(
            [asked[i] for i in rows], height=args.size, width=args.size, num_inference_steps=args.steps, eta=1.0,
            guidance_scale=args.guidance, generator=[torch.Generator().manual_seed(args.seed + i) for i in rows],
        )  # fmt: skip
        for i, image in zip(rows, drawn.images, strict=True):
            image.save(folder / names[i])
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "prompt"), *zip(names, asked, strict=True)])


def main() -> None:
    """Open the prior, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("images"), help="the folder to write")
    parser.add_argument("-n", type=int, default=1800, help="how many")
    parser.add_argument("--prior", default=PRIOR, help="a pipeline of Stable Diffusion 1 or 2, folder or hub id")
    parser.add_argument("--prompts", type=Path, default=HERE / "animals.txt", help="one a line")
    parser.add_argument("--size", type=int, default=512, help="height and width")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    args = parser.parse_args()
    if (args.out / "metadata.csv").exists():
        parser.error(f"{args.out} holds images already. Name another folder with --out.")
    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    write_images(args.out, opened(args.prior), prompts, args)


if __name__ == "__main__":
    main()
