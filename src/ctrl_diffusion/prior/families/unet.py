"""Load UNets on pixels (Ho et al. 2020): `DDPMPipeline` and `DDIMPipeline`, unconditional or with a class embedding."""

from typing import Any

from torch import Tensor

from ...chain.codec import Codec
from ..family import Family, check_channels, check_class, check_size, refuse_inputs, sides_of
from ..network import ControlSite

PARTS, OPTIONAL, ALONE = ("unet",), (), True
# linear layers and convolutions of residual and attention blocks, by the endings of their names
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj")


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """Return the family of a pipeline; cond is `c` (B,) if it has a class embedding."""
    network, config = pipeline.unet, pipeline.unet.config
    check_class("unet", network, "UNet2DModel")
    if config.time_embedding_type != "positional":
        given = {"fourier": "is given σ (fourier embedding)", "learned": "has a learned table of timesteps"}
        what = given.get(config.time_embedding_type, f"has a {config.time_embedding_type} embedding of time")
        raise ValueError(f"its unet {what}, not the positional embedding of a discrete timestep, which is supported")
    refuse_inputs("unet", config, {"class_embed_type": (None,)})
    check_channels("unet", config.in_channels, config.out_channels, config.in_channels)

    def call(x_t: Tensor, timestep: Tensor, c: Tensor | None = None) -> Tensor:
        return network(x_t, timestep, class_labels=c, return_dict=False)[0]

    height, width = size if size and config.sample_size is None else sides_of(config.sample_size)
    check_size(size, (height, width))
    site = ControlSite(("time_embedding",), network.time_embedding.linear_2.out_features, TARGETS, rank=16)
    return Family(network, call, Codec((config.in_channels, height, width)), site, config.num_class_embeds)
