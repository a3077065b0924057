"""DiT on pixels (Peebles & Xie 2023): `DiTPipeline` without a VAE, conditioned on a class."""

import json
import warnings
from pathlib import Path

import diffusers
from diffusers import DiTTransformer2DModel
from torch import Tensor

from ..denoise import ControlSite, NetworkDenoiser
from . import schedule_of


def load(folder: Path) -> tuple[NetworkDenoiser, int]:
    """The denoiser of a pipeline folder and its number of classes; cond is `c` (B,), null class = that number."""
    index = json.loads((folder / "model_index.json").read_text())
    if (index.get("vae") or [None])[0] is not None:
        raise ValueError(f"{folder} is a latent model: it has a VAE. So far only DiT on pixels is supported.")
    network = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder, subfolder="scheduler")
    config, size = network.config, network.config.sample_size

    def call(x_t: Tensor, timestep: Tensor, c: Tensor) -> Tensor:
        return network(x_t, timestep, class_labels=c, return_dict=False)[0]

    blocks = range(config.num_layers)
    site = ControlSite(
        embeddings=tuple(f"transformer_blocks.{i}.norm1.emb" for i in blocks),
        width=config.num_attention_heads * config.attention_head_dim,
        targets=("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear", "proj_out_1", "proj_out_2"),
    )
    if scheduler.config.get("thresholding"):
        raise ValueError(f"{folder} asks for dynamic thresholding of x̂, which is not supported.")
    clip = scheduler.config.clip_sample_range if scheduler.config.get("clip_sample") else None
    if clip is not None:
        warnings.warn(f"this prior clips x̂ to ±{clip}: saturated pixels give learners no gradient.", stacklevel=2)
    shape = (config.in_channels, size, size)
    prediction = scheduler.config.prediction_type
    denoiser = NetworkDenoiser(network, call, schedule_of(scheduler), prediction, shape, clip, site)
    return denoiser, config.num_embeds_ada_norm
