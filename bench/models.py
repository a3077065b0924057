"""Measure seconds, memory and evaluations of every learner's update on text models of real size with random weights.

python bench/models.py tiny          (a small Stable Diffusion on the CPU, a minute)
python bench/models.py sd15          (Stable Diffusion 1.5 at 512 × 512, bf16, 50 steps; needs a GPU)
python bench/models.py sdxl          (SDXL at 1024 × 1024, bf16, adjoint on a chain of 2 steps; needs a GPU)

Evaluations are rows of the network's batch, two a sample under guidance; a backward pass is not counted as another.
`rate` is evaluations a second over those of the bare network's own forward passes, at the same batch and precision in
the same run: 1 if every evaluation were a forward pass and nothing else took time. Writes
bench/results/models-NAME.json.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import evidence
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModelWithProjection

from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.reward import Reward
from ctrl_diffusion.reward.scorer import Classifier
from ctrl_diffusion.system.files import rounded

sys.path.insert(0, str(evidence.ROOT / "tests"))
from pipelines import WIDTH, clip, clip_tokenizer, stable_diffusion

SD = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
# from the models' own configs
SD15 = {
    **SD, "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SDXL = {
    **SD, "sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + WIDTH,
}  # fmt: skip
# steps of the chain, paths a rollout, samples at once, learners
PLANS: dict[str, tuple[int, int, int | None, tuple[str, ...]]] = {
    "tiny": (10, 8, None, ("weighted", "adjoint", "backprop", "ppo")),
    "sd15": (50, 8, 2, ("weighted", "adjoint", "backprop", "ppo")),
    "sdxl": (2, 1, 1, ("adjoint",)),
}


def vae() -> AutoencoderKL:
    """Build the autoencoder of Stable Diffusion, eight times smaller a side."""
    return AutoencoderKL(
        latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def pipeline(name: str) -> Any:
    """Build a pipeline of that size; its text encoders are small, since prompts are encoded once."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    if name == "tiny":
        return stable_diffusion(scheduler)
    parts = {"vae": vae(), "text_encoder": clip(), "tokenizer": clip_tokenizer(), "scheduler": scheduler}
    if name == "sdxl":
        second = {"text_encoder_2": clip(CLIPTextModelWithProjection), "tokenizer_2": clip_tokenizer()}
        return StableDiffusionXLPipeline(
            unet=UNet2DConditionModel(cross_attention_dim=2 * WIDTH, **SDXL), **parts, **second
        )
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(unet=UNet2DConditionModel(cross_attention_dim=WIDTH, **SD15), **parts, **nothing)


def seconds_and_gigabytes(device: torch.device) -> tuple[float, float]:
    """Return the clock once the device is idle, and the peak memory so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter(), torch.cuda.max_memory_allocated() / 1e9
    return time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@contextmanager
def counted(network: torch.nn.Module) -> Iterator[list[int]]:
    """Yield a list that collects the rows of every batch of the network."""
    rows: list[int] = []
    handle = network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    handle.remove()


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    steps, batch, micro, learners = PLANS[name]
    torch.manual_seed(0)
    diffusion = pipeline(name)
    prior = Prior.from_pipeline(diffusion, type(diffusion).__name__).with_prompts(["a cat", "a dog"], guidance=5.0)
    prior = prior.placed("auto", "no" if name == "tiny" else "bf16")
    denoiser, network, device = prior.denoiser, prior.denoiser.network, prior.denoiser.device
    classifier = Classifier(3, 4, depth=4, halvings=3).requires_grad_(False).eval().to(device)
    reward = Reward({"y": classifier}, codec=prior.codec, device=device)
    conditions = Conditions({"c": torch.arange(2)}, {"y": 4})
    policy = Policy(denoiser, LoRAControl("y", "0123", denoiser, rank=16))
    times = denoiser.times(steps, 0.05, 2.0)
    x_t, c = torch.randn(micro or batch, *denoiser.shape, device=device), torch.zeros(micro or batch, dtype=torch.long)
    bare, repeats = 0.0, 5
    with torch.no_grad():
        for warm in (True, False):
            begin, _ = seconds_and_gigabytes(device)
            for _ in range(1 if warm else repeats):
                denoiser(x_t, 0.5, c=c)
            bare = 2 * len(x_t) * repeats / (seconds_and_gigabytes(device)[0] - begin)
    cache = torch.randn(2 * 16, *denoiser.shape)
    streams = {
        "weighted": lambda: Weighted(cache, times, batch, micro=micro),
        "adjoint": lambda: Adjoint(times, batch, micro=micro, reuse=1),
        "backprop": lambda: Backprop(times, batch, micro=micro),
        "ppo": lambda: PPO(times, batch, micro=micro, reuse=1),
    }
    rows = []
    for learner in learners:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        stream = streams[learner]()(policy, reward, conditions, torch.Generator().manual_seed(0))
        updates = fit(policy, stream, 3, {"embedding": 1e-4, "adapter": 1e-4})
        next(updates)  # the first is not counted: kernels are chosen, memory is taken
        with counted(network) as evaluated:
            begin, _ = seconds_and_gigabytes(device)
            list(updates)
            end, gigabytes = seconds_and_gigabytes(device)
        rate = sum(evaluated) / (end - begin) / bare
        rows.append(
            {"learner": learner, "seconds": (end - begin) / 2, "evaluations": sum(evaluated) // 2, "rate": rate}
            | ({"peak_gigabytes": gigabytes} if device.type == "cuda" else {})
        )
        print(json.dumps(rounded(rows[-1])), flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    about = {"model": name, "steps": steps, "batch": batch, "micro_batch": micro, "device": where}
    about["parameters"] = sum(p.numel() for p in network.parameters())
    evidence.write(f"models-{name}", {**about, "rows": rows})


if __name__ == "__main__":
    main()
