"""Name the weights of a LoRA as the programs that load it want them.

kohya's names, `lora_unet_<path>.lora_down.weight`, `.lora_up.weight`, `.alpha`, are read by nearly all for UNets. A
shift of a bias is `.diff_b` there, which A1111 and InvokeAI take beside a full `.diff` only. For transformers ComfyUI
wants the path with its dots; diffusers wants PEFT's names, whose scale is 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...control.plain import PlainLoRA

Layout = Callable[[PlainLoRA, nn.Module], dict[str, Tensor]]  # of a network's LoRA → tensors by name
TELLING = "attn2.to_k"  # the ending of the layers by whose width InvokeAI tells the base model


def matrices(lora: PlainLoRA, layer: str, key: str) -> dict[str, Tensor]:
    """Return the matrices of a layer and their α as kohya ends the names."""
    return {
        f"{key}.lora_down.weight": lora.down[layer],
        f"{key}.lora_up.weight": lora.up[layer],
        f"{key}.alpha": torch.tensor(lora.scale * lora.rank),
    }


def kohya(lora: PlainLoRA, network: nn.Module) -> dict[str, Tensor]:
    """Name a LoRA of a UNet as ComfyUI, A1111, Forge and InvokeAI read it."""
    tensors = {}
    for layer in lora.down:
        if layer != lora.biased:
            tensors |= matrices(lora, layer, kohya_key(layer))
    if not any(layer.endswith(TELLING) for layer in lora.down):
        tensors |= no_change(network)
    key = kohya_key(lora.biased)
    return tensors | {f"{key}.diff": lora.delta, f"{key}.diff_b": lora.bias}


def kohya_key(layer: str) -> str:
    """Return kohya's name of a UNet's layer."""
    return f"lora_unet_{layer.replace('.', '_')}"


def no_change(network: nn.Module) -> dict[str, Tensor]:
    """Return matrices of zeros for one layer of cross-attention, whose width tells the base model; none without one."""
    for name, module in network.named_modules():
        if name.endswith(TELLING):
            down, up = torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1)
            key = kohya_key(name)
            return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    return {}


def dotted(lora: PlainLoRA, network: nn.Module) -> dict[str, Tensor]:
    """Name a LoRA of a transformer as ComfyUI reads it, which takes a bias beside matrices."""
    tensors = {}
    for layer in lora.down:
        tensors |= matrices(lora, layer, f"transformer.{layer}")
    return tensors | {f"transformer.{lora.biased}.diff_b": lora.bias}


def peft(component: str) -> Layout:
    """Return the layout of diffusers' `load_lora_weights`, for a part of a pipeline.

    PEFT gives every layer of an adapter a bias or none, so all others have one of zeros.
    """

    def named(lora: PlainLoRA, network: nn.Module) -> dict[str, Tensor]:
        down, up = dict(lora.down), dict(lora.up)
        if lora.biased not in down:
            out_features, in_features = lora.shape
            down[lora.biased], up[lora.biased] = (
                torch.zeros(lora.rank, in_features),
                torch.zeros(out_features, lora.rank),
            )
        tensors = {}
        for layer in down:
            bias = lora.bias if layer == lora.biased else torch.zeros(len(up[layer]))
            tensors[f"{component}.{layer}.lora_A.weight"] = down[layer]
            tensors[f"{component}.{layer}.lora_B.weight"] = lora.scale * up[layer]
            tensors[f"{component}.{layer}.lora_B.bias"] = bias
        return tensors

    return named
