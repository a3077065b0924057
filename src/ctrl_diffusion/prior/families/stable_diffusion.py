"""Load Stable Diffusion 1.x, 2.x (Rombach et al. 2022) and SDXL (Podell et al. 2024): a UNet on latents, given text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..family import Family, check_channels, check_class, image_size, refuse_inputs
from ..latents import Autoencoder
from ..network import ControlSite, last_linear
from ..text.encoded import Rows
from ..text.encoders import encoders_of
from ..text.prompted import TextFamily, default_guidance

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")  # the last two of SDXL
OPTIONAL, ALONE = (), False
# linear layers of attention, feed-forward and time, by the endings of their names
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj")

# values of a config that want no input but the text's
NO_INPUT = {
    "class_embed_type": (None,), "num_class_embeds": (None,), "encoder_hid_dim_type": (None, "text_proj"),
    "addition_embed_type": (None, "text", "text_time"),
}  # fmt: skip


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """Return the family of a pipeline, with or without SDXL's second encoder."""
    network = pipeline.unet
    check_class("unet", network, "UNet2DConditionModel")
    if network.config.time_cond_proj_dim is not None:
        raise ValueError("its unet is distilled for few steps and is given the guidance, which is not supported")
    size = image_size(size, network.config.sample_size, pipeline.vae_scale_factor)
    codec = Autoencoder(pipeline.vae, size)
    check_channels("unet", network.config.in_channels, network.config.out_channels, codec.shape[0])
    refuse_inputs("unet", network.config, NO_INPUT)
    large = hasattr(pipeline, "text_encoder_2")

    def encode(prompts: Sequence[str], negative: str | None) -> tuple[Rows, Rows]:
        # SDXL was trained with zeros for no text, not with the empty prompt; the pipeline returns them for None
        negatives = [negative] * len(prompts) if negative or not large else None
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "negative_prompt": negatives}
        if negative is None:
            options |= {"do_classifier_free_guidance": False, "negative_prompt": None}
        device = pipeline.text_encoder.device
        states, null_states, *pooled = pipeline.encode_prompt(list(prompts), device=device, **options)
        rows = {"encoder_hidden_states": states, **({"text_embeds": pooled[0]} if large else {})}
        if negative is None:
            return rows, {}
        null = {"encoder_hidden_states": null_states[:1], **({"text_embeds": pooled[1][:1]} if large else {})}
        return rows, null

    def call(x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor | None = None) -> Tensor:
        added = None
        if text_embeds is not None:
            ids = torch.tensor([*size, 0, 0, *size]).to(x_t).expand(len(x_t), 6)  # as if not cropped
            added = {"text_embeds": text_embeds, "time_ids": ids}
        return network(x_t, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]

    width, biased = network.time_embedding.linear_2.out_features, last_linear(network, "time_embedding.linear_2")
    site = ControlSite(("time_embedding",), width, TARGETS, 16, biased)
    text = TextFamily(encode, call, default_guidance(pipeline), encoders=encoders_of(pipeline))
    return Family(network, call, codec, site, text=text)
