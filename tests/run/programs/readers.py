"""How other programs load a LoRA file: the keys they accept and the formula they apply, from their sources.

ComfyUI: comfy/lora.py, comfy/utils.py (`unet_to_diffusers`, `mmdit_to_diffusers`, `flux_to_diffusers`). A1111:
extensions-builtin/Lora/networks.py, network_lora.py, network_full.py. InvokeAI: backend/patches/lora_conversions,
layers/utils.py, layers/full_layer.py.
"""

import re
from functools import lru_cache

import torch

UNET = (
    r"(down_blocks|up_blocks)_\d+_(resnets_\d+_(conv1|conv2|conv_shortcut|time_emb_proj|norm[12])|(down|up)samplers_0_conv)"
    r"|((down_blocks|up_blocks)_\d+|mid_block)_attentions_\d+_(proj_in|proj_out|norm"
    r"|transformer_blocks_\d+_(norm[123]|attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)))"
    r"|mid_block_resnets_\d+_(conv1|conv2|time_emb_proj|norm[12])|time_embedding_linear_[12]|conv_(in|out|norm_out)"
)
BLOCK = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
)
EMBEDDERS = (
    r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]|context_embedder|proj_out|norm_out\.linear"
)
SINGLE = r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
TRANSFORMER = rf"transformer\.({BLOCK}|{EMBEDDERS}|pos_embed\.proj|x_embedder|{SINGLE})"


@lru_cache(maxsize=4)
def modules_of(network):
    """The modules by their paths, with and without dots, and by the names that A1111 has for those with weights."""
    named = dict(network.named_modules())
    flat = {name.replace(".", "_"): module for name, module in named.items()}
    weighted = {name: m for name, m in flat.items() if getattr(m, "weight", None) is not None}
    return {**named, **flat}, {compvis(f"lora_unet_{name}"): module for name, module in weighted.items()}


def layer_of(network, key, prefix):
    return modules_of(network)[0].get(key.removeprefix(prefix))


def comfyui(key, network):
    if re.fullmatch(TRANSFORMER, key) and not hasattr(network, "down_blocks"):
        return layer_of(network, key, "transformer.")
    if re.fullmatch(f"lora_unet_({UNET})", key) and hasattr(network, "down_blocks"):
        return layer_of(network, key, "lora_unet_")
    return None


RESNET = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip


def compvis(key):
    """The original name of a UNet's layer, by A1111's arithmetic; None if it has none."""
    if found := re.fullmatch(r"lora_unet_time_embedding_linear_(\d)", key):
        return f"time_embed_{2 * int(found[1]) - 2}"
    if found := re.fullmatch(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", key):
        way, block, kind, i, rest = found.groups()
        number = 3 * int(block) + int(i) + (way == "down")
        side = "input" if way == "down" else "output"
        rest = RESNET.get(rest, rest) if kind == "resnets" else rest
        return f"{side}_blocks_{number}_{int(kind == 'attentions')}_{rest}"
    if found := re.fullmatch(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", key):
        kind, i, rest = found.groups()
        rest = RESNET.get(rest, rest) if kind == "resnets" else rest
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(i)}_{rest}"
    return None


def a1111(key, network):
    """Its own network has the compvis names; here it is found again as the one layer that has that name."""
    name = compvis(key)
    return None if name is None else modules_of(network)[1].get(name)


def invokeai(key, network):
    return layer_of(network, key, "lora_unet_") if key.startswith("lora_unet_") else None


READERS = {"comfyui": comfyui, "a1111": a1111, "invokeai": invokeai}


def grouped(tensors):
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha", ".diff", ".diff_b")
    layers = {}
    for key, value in tensors.items():
        end = next((end for end in ends if key.endswith(end)), None)
        if end is None:
            return {}, [key]
        layers.setdefault(key.removesuffix(end), {})[end] = value
    return layers, []


@torch.no_grad()
def apply(tensors, network, program, strength=1.0):
    """Change a network as a program does; the keys that it does not use."""
    layers, unused = grouped(tensors)
    for key, parts in layers.items():
        module, parts = READERS[program](key, network), dict(parts)
        if module is None:
            unused += [key + end for end in parts]
            continue
        if ".lora_up.weight" in parts:
            up, down, alpha = (parts.pop(end) for end in (".lora_up.weight", ".lora_down.weight", ".alpha"))
            delta = (up.flatten(1) @ down.flatten(1)).view(module.weight.shape)
            module.weight += strength * float(alpha) / len(down) * delta
            if program != "comfyui":  # the first kind of layer that fits is taken, and the rest of it is not read
                unused += [key + end for end in parts]
                continue
        if ".diff" in parts:
            module.weight += strength * parts.pop(".diff")
        elif program != "comfyui":
            unused += [key + end for end in parts]
            continue
        if ".diff_b" in parts:
            module.bias += strength * parts.pop(".diff_b")
        unused += [key + end for end in parts]
    return unused


def token_width(tensors):
    """By what InvokeAI tells the base model: the width of the states that cross-attention is given."""
    widths = [v.shape[1] for key, v in tensors.items() if re.search(r"attn2_to_[kv]\.lora_down\.weight", key)]
    return widths[0] if widths else None
