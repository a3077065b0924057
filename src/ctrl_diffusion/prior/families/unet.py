"""UNets on pixels (Ho et al. 2020): `DDPMPipeline` and `DDIMPipeline`, unconditional or with a class embedding."""

from typing import Any

from torch import Tensor

from ...chain.codec import Codec
from ..family import Family, fixed
from ..network import ControlSite

# linear layers and convolutions of residual and attention blocks, by the endings of their names
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj")
ALONE = "unet"


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """The network of a pipeline; cond is `c` (B,) if it has a class embedding."""
    network = pipeline.unet
    config = network.config
    if config.time_embedding_type != "positional":
        raise ValueError(f"its UNet is given σ ({config.time_embedding_type} embedding), not a discrete timestep")
    if config.sample_size is None:
        raise ValueError("its UNet's config does not say sample_size, the height and width of an image")

    def call(x_t: Tensor, timestep: Tensor, c: Tensor | None = None) -> Tensor:
        return network(x_t, timestep, class_labels=c, return_dict=False)[0]

    side = config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    fixed(size, (height, width))
    site = ControlSite(
        embeddings=("time_embedding",), width=network.time_embedding.linear_2.out_features, targets=TARGETS, rank=16
    )
    return Family(network, call, Codec((config.in_channels, height, width)), site, config.num_class_embeds)
