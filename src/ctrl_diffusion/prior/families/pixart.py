"""Load PixArt-α (Chen et al. 2023) and PixArt-Σ (Chen et al. 2024): a transformer on latents, given text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..family import Family, check_channels, check_class, image_size
from ..latents import Autoencoder
from ..network import ControlSite, last_linear
from ..text.encoded import Rows
from ..text.encoders import encoders_of
from ..text.prompted import TextFamily, default_guidance

PARTS, OPTIONAL, ALONE = ("transformer", "vae", "text_encoder", "tokenizer"), (), False
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of self-attention and of attention to the text


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """Return the family of a pipeline; a network that takes height, width and their ratio (α at 1024²) is told them."""
    network, config = pipeline.transformer, pipeline.transformer.config
    check_class("transformer", network, "PixArtTransformer2DModel")
    size = image_size(size, config.sample_size, pipeline.vae_scale_factor, config.patch_size)
    codec = Autoencoder(pipeline.vae, size)
    check_channels("transformer", config.in_channels, network.out_channels, codec.shape[0])

    def encode(prompts: Sequence[str], negative: str | None) -> tuple[Rows, Rows]:
        # The pipeline also cleans prompts where two more packages are installed. That is left out, as it is where they
        # are not: the same prompt is the same bytes everywhere. Letters are made small in any case.
        states, mask, null, null_mask = pipeline.encode_prompt(
            list(prompts), negative is not None, negative or "", device=pipeline.text_encoder.device
        )
        # the network multiplies by the mask, which may have the states' type, as what is kept in files must
        rows = {"encoder_hidden_states": states, "encoder_attention_mask": mask.to(states.dtype)}
        if negative is None:
            return rows, {}
        return rows, {"encoder_hidden_states": null[:1], "encoder_attention_mask": null_mask[:1].to(states.dtype)}

    def call(x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        added = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            added["resolution"] = torch.tensor(size).to(x_t).expand(len(x_t), 2)
            added["aspect_ratio"] = torch.tensor([size[0] / size[1]]).to(x_t).expand(len(x_t), 1)
        return network(
            x_t, encoder_hidden_states, timestep, added, encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]  # fmt: skip

    biased = last_linear(network, "adaln_single.emb.timestep_embedder.linear_2")
    site = ControlSite(("adaln_single.emb",), network.inner_dim, TARGETS, 16, biased)
    text = TextFamily(encode, call, default_guidance(pipeline), encoders=encoders_of(pipeline, t5="text_encoder"))
    return Family(network, call, codec, site, text=text)
