"""Load Z-Image (Tongyi 2025): a transformer on latents of a flow, given text; its own time is 1 at the data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..family import Family, check_channels, check_class, check_sides, image_size
from ..latents import Autoencoder
from ..network import ControlSite, last_linear
from ..text.encoded import Rows
from ..text.encoders import TextEncoder, encoders_of
from ..text.prompted import TextFamily, default_guidance

PARTS, OPTIONAL, ALONE = ("transformer", "vae", "text_encoder", "tokenizer"), (), False
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SIZE = (1024, 1024)  # the pipeline's own, which neither its signature nor a config says
PATCH = 2  # latents a side that become one token: the only one the pipeline asks for


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """Return the family of a pipeline; its largest sides are those of the network's table of positions.

    The pipeline's guidance w is f(c) + w (f(c) − f(∅)), so ours is w + 1.
    """
    network = pipeline.transformer
    check_class("transformer", network, "ZImageTransformer2DModel")
    if network.config.siglip_feat_dim is not None:
        raise ValueError("its transformer is given an image beside the text (siglip_feat_dim), which is not supported")
    size = image_size(size or SIZE, None, pipeline.vae_scale_factor, PATCH)
    check_sides(size, pipeline.vae_scale_factor * PATCH, *network.config.axes_lens[1:])
    codec = Autoencoder(pipeline.vae, size)
    check_channels("transformer", network.in_channels, network.out_channels, codec.shape[0])
    encoders = encoders_of(pipeline, t5="text_encoder")
    window, places = encoders["text_encoder"].window, network.config.axes_lens[0]
    if window + 2 > places:  # the text's begin with 1, and the image has the one after it
        raise ValueError(f"its transformer has {places} positions for the {window} tokens of a prompt and two more")

    def padded(states: list[Tensor]) -> Rows:
        """Return states (T_i, F) of prompts as (G, window, F), with a mask (G, window) of those there are."""
        ends = torch.tensor([len(each) for each in states])[:, None]
        longest = states[0].new_zeros(window, states[0].shape[1])
        rows = pad_sequence([*states, longest], batch_first=True)[:-1]
        return {"encoder_hidden_states": rows, "encoder_attention_mask": (torch.arange(window) < ends).to(rows)}

    def encode(prompts: Sequence[str], negative: str | None) -> tuple[Rows, Rows]:
        device = pipeline.text_encoder.device
        rows, _ = pipeline.encode_prompt(list(prompts), device, do_classifier_free_guidance=False)
        if negative is None:
            return padded(rows), {}
        null, _ = pipeline.encode_prompt([negative], device, do_classifier_free_guidance=False)
        return padded(rows), padded(null)

    def call(x_t: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        mask = encoder_attention_mask > 0
        # on the meta device there are no values; the shape of what is predicted does not depend on them
        counts = [window] * len(mask) if mask.is_meta else mask.sum(1).cpu().tolist()
        captions = [states[:count] for states, count in zip(encoder_hidden_states, counts, strict=True)]
        images = list(x_t.unsqueeze(2).unbind())  # of one frame each
        velocities = network(images, (1000 - timestep) / 1000, captions, return_dict=False)[0]
        if mask.is_meta:
            network.rope_embedder.freqs_cis = None  # a table that was moved there with the call, and lost its values
        return -torch.stack(velocities).squeeze(2)

    biased = last_linear(network, "t_embedder.mlp.2")
    site = ControlSite(("t_embedder",), network.t_embedder.mlp[2].out_features, TARGETS, 16, biased)
    guidance = default_guidance(pipeline) + 1
    text = TextFamily(encode, call, guidance, encoders={"text_encoder": beside_template(encoders["text_encoder"])})
    return Family(network, call, codec, site, text=text, tokens=codec.shape[1] * codec.shape[2] // PATCH**2)


def beside_template(encoder: TextEncoder) -> TextEncoder:
    """Return a text encoder with the window that the template of a chat leaves to a prompt."""
    message = [{"role": "user", "content": ""}]
    template = encoder.tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    (length,) = encoder._replace(window=0).lengths([template])
    return encoder._replace(window=encoder.window - length)
