"""Load DiT (Peebles & Xie 2023): `DiTPipeline` on latents, or without a VAE on pixels, conditioned on a class."""

from typing import Any

from torch import Tensor

from ...chain.codec import Codec
from ..family import Family, check_channels, check_class, check_size
from ..latents import Autoencoder, factor_of
from ..network import ControlSite

PARTS, OPTIONAL, ALONE = ("transformer",), ("vae",), True
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "norm1.linear", "proj_out_1", "proj_out_2")


def load(pipeline: Any, size: tuple[int, int] | None) -> Family:
    """Return the family of a pipeline; cond is `c` (B,), the null class is the number of classes."""
    network, vae = pipeline.transformer, getattr(pipeline, "vae", None)
    check_class("transformer", network, "DiTTransformer2DModel")
    config, side = network.config, network.config.sample_size
    codec = Codec((config.in_channels, side, side)) if vae is None else Autoencoder(vae, (factor_of(vae) * side,) * 2)
    check_channels("transformer", config.in_channels, network.out_channels, codec.shape[0])
    check_size(size, codec.image_shape[1:])

    def call(x_t: Tensor, timestep: Tensor, c: Tensor) -> Tensor:
        return network(x_t, timestep, class_labels=c, return_dict=False)[0]

    embeddings = tuple(f"transformer_blocks.{i}.norm1.emb" for i in range(config.num_layers))
    site = ControlSite(embeddings, config.num_attention_heads * config.attention_head_dim, TARGETS)
    classes = config.num_embeds_ada_norm
    return Family(network, call, codec, site, classes, null=classes)
