"""Make what the embedded priors have in common: a DiT on pixels, its noise schedule, and the cost of one evaluation."""

import statistics
import time

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from ctrl_diffusion.prior.prior import Prior


def pixel_dit(side: int, classes: int, heads: int, layers: int) -> DiTTransformer2DModel:
    """Make a DiT on one channel of side × side pixels, of width 24 · heads; the class after the last is null.

    In train mode every block would drop the class on its own: the null class is drawn by the training, for all alike.
    """
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=24,
        num_layers=layers,
        in_channels=1,
        out_channels=1,
        sample_size=side,
        patch_size=4,
        num_embeds_ada_norm=classes,
        norm_type="ada_norm_zero",
    ).eval()


def new_scheduler() -> DDPMScheduler:
    """Make the noise schedule: squared cosine, v-prediction."""
    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )


def seconds_per_evaluation(prior: Prior, batch: int = 64, repeats: int = 50) -> float:
    """Return the median seconds of one evaluation of a batch on one thread."""
    x_t, c, seconds = torch.randn(batch, *prior.denoiser.shape), torch.arange(batch) % prior.classes, []
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            prior.denoiser(x_t, 0.5, c=c)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
