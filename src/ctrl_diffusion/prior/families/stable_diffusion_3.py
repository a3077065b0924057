"""Stable Diffusion 3 (Esser et al. 2024): a transformer on latents of a rectified flow, given text."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..family import Family, default_guidance, sized
from ..latents import Autoencoder
from ..network import ControlSite
from ..text import Rows, TextFamily, place_of

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ALONE = None


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """The network of a pipeline."""
    network = pipeline.transformer
    config = network.config
    size = sized(size, config.sample_size, pipeline.vae_scale_factor, config.patch_size)
    codec = Autoencoder(pipeline.vae, size)

    def encode(prompts: Sequence[str], negative: str) -> tuple[Rows, Rows]:
        texts = list(prompts)
        rows, null, pooled, null_pooled = pipeline.encode_prompt(
            texts, None, None, device=place_of(pipeline), negative_prompt=[negative] * len(texts)
        )
        return (
            {"encoder_hidden_states": rows, "pooled_projections": pooled},
            {"encoder_hidden_states": null[:1], "pooled_projections": null_pooled[:1]},
        )

    def call(x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor) -> Tensor:
        return network(
            x_t, encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections, timestep=timestep,
            return_dict=False,
        )[0]  # fmt: skip

    site = ControlSite(("time_text_embed",), network.inner_dim, TARGETS, rank=16)
    text = TextFamily(encode, call, default_guidance(pipeline))
    patch = config.patch_size**2
    return Family(network, call, codec, site, text=text, tokens=codec.shape[1] * codec.shape[2] // patch)
