"""Shard a prior's weights over ranks, by FSDP2."""

from functools import partial

from torch import nn

from ..system.ranks import all_gather, state, world_size
from .network import NetworkDenoiser


def shard(denoiser: NetworkDenoiser, device: str = "auto") -> None:
    """Leave every rank a shard of a prior's weights, on its own device; all ranks call it in step from now on.

    The units that are gathered and freed at a time are the members of the network's lists (transformer blocks, a UNet's
    stages), children that have such lists (a UNet's middle), and all the rest. A control's weights are added later and
    stay whole. Any `device` but "auto" is refused (ValueError).
    """
    if device != "auto":
        raise ValueError(f"device: sharded weights are where accelerate puts them. Use auto, not {device}.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # a second of import

    mesh, network = init_device_mesh(state().device.type, (world_size(),)), denoiser.network
    for name in denoiser.site.embeddings:  # some networks call one from outside of the block it is in
        fully_shard(network.get_submodule(name), mesh=mesh)
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                fully_shard(block, mesh=mesh)
        elif any(isinstance(module, nn.ModuleList) for module in child.modules()):
            fully_shard(child, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    denoiser.all_gather = partial(all_gather, dim=1)
