"""DiT on pixels (Peebles & Xie 2023): `DiTPipeline` without a VAE, conditioned on a class."""

from pathlib import Path

from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from ..denoise import ControlSite, NetworkDenoiser
from . import schedule_of


def load(folder: Path) -> tuple[NetworkDenoiser, int]:
    """The denoiser of a pipeline folder and its number of classes; cond is `c` (B,), null class = that number."""
    network = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")  # any scheduler's config: same ᾱ
    config, size = network.config, network.config.sample_size

    def call(x_t: Tensor, timestep: Tensor, c: Tensor) -> Tensor:
        return network(x_t, timestep, class_labels=c, return_dict=False)[0]

    blocks = range(config.num_layers)
    site = ControlSite(
        embeddings=tuple(f"transformer_blocks.{i}.norm1.emb" for i in blocks),
        width=config.num_attention_heads * config.attention_head_dim,
        targets=("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear", "proj_out_1", "proj_out_2"),
    )
    clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
    shape = (config.in_channels, size, size)
    prediction = scheduler.config.prediction_type
    denoiser = NetworkDenoiser(network, call, schedule_of(scheduler), prediction, shape, clip, site)
    return denoiser, config.num_embeds_ada_norm
