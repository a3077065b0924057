"""Load Stable Diffusion 3 (Esser et al. 2024): a transformer on latents of a rectified flow, given text."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..family import Family, check_channels, check_class, image_size
from ..latents import Autoencoder
from ..network import ControlSite, last_linear
from ..text.encoded import Rows
from ..text.encoders import encoders_of
from ..text.prompted import TextFamily, default_guidance

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
OPTIONAL, ALONE = ("text_encoder_3", "tokenizer_3"), False
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """Return the family of a pipeline."""
    network, config = pipeline.transformer, pipeline.transformer.config
    check_class("transformer", network, "SD3Transformer2DModel")
    size = image_size(size, config.sample_size, pipeline.vae_scale_factor, config.patch_size)
    codec = Autoencoder(pipeline.vae, size)
    check_channels("transformer", config.in_channels, network.out_channels, codec.shape[0])

    def encode(prompts: Sequence[str], negative: str | None) -> tuple[Rows, Rows]:
        guided = negative is not None
        options = {"device": pipeline.text_encoder.device, "do_classifier_free_guidance": guided}
        options["negative_prompt"] = [negative] * len(prompts) if guided else None
        rows, null, pooled, null_pooled = pipeline.encode_prompt(list(prompts), None, None, **options)
        names = ("encoder_hidden_states", "pooled_projections")
        nulls = (null[:1], null_pooled[:1]) if guided else ()
        return dict(zip(names, (rows, pooled), strict=True)), dict(zip(names, nulls, strict=guided))

    def call(x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor) -> Tensor:
        return network(x_t, encoder_hidden_states, pooled_projections, timestep, return_dict=False)[0]

    biased = last_linear(network, "time_text_embed.timestep_embedder.linear_2")
    site = ControlSite(("time_text_embed",), network.inner_dim, TARGETS, 16, biased)
    encoders = encoders_of(pipeline, t5="text_encoder_3")
    text = TextFamily(encode, call, default_guidance(pipeline), encoders=encoders)
    tokens = codec.shape[1] * codec.shape[2] // config.patch_size**2
    return Family(network, call, codec, site, text=text, tokens=tokens)
