"""Load Flux (Black Forest Labs 2024): a transformer on packed latents of a flow, given text and perhaps guidance."""

import warnings
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
OPTIONAL, ALONE = (), False
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
    "ff.net.2", "proj_mlp",
)  # fmt: skip
PATCH = 2  # latents a side that become one token


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """Return the family of a pipeline."""
    network = pipeline.transformer
    check_class("transformer", network, "FluxTransformer2DModel")
    size = image_size(size, pipeline.default_sample_size, pipeline.vae_scale_factor, PATCH)
    codec = Autoencoder(pipeline.vae, size)
    channels, height, width = codec.shape
    given, predicted = (count // PATCH**2 for count in (network.config.in_channels, network.out_channels))
    check_channels("transformer", given, predicted, channels)
    if not network.config.guidance_embeds:
        warnings.warn(
            "its transformer is given no guidance: if it is one distilled for few steps (FLUX.1-schnell), it does not "
            "predict the mean of x_0, and is a poor prior.", stacklevel=2,
        )  # fmt: skip

    def encode(prompts: Sequence[str], negative: str | None) -> tuple[Rows, Rows]:
        if negative:
            raise ValueError("Flux takes no negative prompt")
        rows, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=pipeline.text_encoder.device)
        return {"encoder_hidden_states": rows, "pooled_projections": pooled}, {}

    def call(
        x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor, guidance: Tensor
    ) -> Tensor:
        packed = pipeline._pack_latents(x_t, len(x_t), channels, height, width)
        ids = pipeline._prepare_latent_image_ids(len(x_t), height // PATCH, width // PATCH, x_t.device, x_t.dtype)
        velocity = network(
            packed, encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections,
            timestep=timestep / 1000, img_ids=ids, txt_ids=ids.new_zeros(encoder_hidden_states.shape[1], 3),
            guidance=guidance if network.config.guidance_embeds else None, return_dict=False,
        )[0]  # fmt: skip
        return pipeline._unpack_latents(velocity, *size, pipeline.vae_scale_factor)

    biased = last_linear(network, "time_text_embed.timestep_embedder.linear_2")
    site = ControlSite(("time_text_embed",), network.inner_dim, TARGETS, 16, biased)
    text = TextFamily(
        encode, call, default_guidance(pipeline), distilled=True,  # to take guidance, if any, as a number
        encoders=encoders_of(pipeline, t5="text_encoder_2"),
    )  # fmt: skip
    return Family(network, call, codec, site, text=text, tokens=height * width // PATCH**2)
