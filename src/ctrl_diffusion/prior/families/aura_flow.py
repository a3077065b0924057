"""Load AuraFlow (fal 2024): a transformer on latents of a rectified flow, given text."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..family import Family, check_channels, check_class, check_sides, default_size, image_size
from ..latents import Autoencoder
from ..network import ControlSite, last_linear
from ..text.encoded import Rows
from ..text.encoders import encoders_of
from ..text.prompted import TextFamily, default_guidance

PARTS, OPTIONAL, ALONE = ("transformer", "vae", "text_encoder", "tokenizer"), (), False
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """Return the family of a pipeline; its largest side is that of the network's table of positions."""
    network, config = pipeline.transformer, pipeline.transformer.config
    check_class("transformer", network, "AuraFlowTransformer2DModel")
    size = image_size(size or default_size(pipeline), None, pipeline.vae_scale_factor, config.patch_size)
    check_sides(size, pipeline.vae_scale_factor * config.patch_size, math.isqrt(config.pos_embed_max_size))
    codec = Autoencoder(pipeline.vae, size)
    check_channels("transformer", config.in_channels, network.out_channels, codec.shape[0])

    def encode(prompts: Sequence[str], negative: str | None) -> tuple[Rows, Rows]:
        guided, device = negative is not None, pipeline.text_encoder.device
        # the masks are of no account: the states of padding are zero already
        rows, _, null, _ = pipeline.encode_prompt(list(prompts), negative, guided, device=device)
        return {"encoder_hidden_states": rows}, {"encoder_hidden_states": null[:1]} if guided else {}

    def call(x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return network(x_t, encoder_hidden_states, timestep / 1000, return_dict=False)[0]

    site = ControlSite(
        ("time_step_proj",), network.inner_dim, TARGETS, 16, last_linear(network, "time_step_proj.linear_2")
    )
    text = TextFamily(encode, call, default_guidance(pipeline), encoders=encoders_of(pipeline, t5="text_encoder"))
    tokens = codec.shape[1] * codec.shape[2] // config.patch_size**2
    return Family(network, call, codec, site, text=text, tokens=tokens)
