"""Find the layers of a network that the keys of a LoRA file mean, whoever wrote it.

PEFT writes `unet.<path>.lora_A.weight`, diffusers once wrote `<path>.lora.down.weight` and
`<path>.processor.to_q_lora.down.weight`, kohya `lora_unet_<path, dots as underscores>.lora_down.weight`. Files with the
names of a model's first code (SDXL and Flux by kohya, Flux by its authors) are for diffusers' own converters.
"""

import re
from collections.abc import Iterable

from torch import Tensor, nn

from ...system.files import some_of

DOWN, UP, ALPHA, UP_BIAS, FULL, BIAS = "down", "up", "alpha", "bias of up", "full", "bias"
ENDINGS = {
    r"\.lora_A(\.\w+)?\.weight|\.lora_down\.weight|\.lora(_linear_layer)?\.down\.weight|_lora\.down\.weight": DOWN,
    r"\.lora_B(\.\w+)?\.weight|\.lora_up\.weight|\.lora(_linear_layer)?\.up\.weight|_lora\.up\.weight": UP,
    r"\.lora_B(\.\w+)?\.bias|\.lora_up\.bias": UP_BIAS,
    r"\.alpha": ALPHA,
    r"\.diff": FULL,
    r"\.diff_b": BIAS,
}
PREFIXES = ("base_model.model.", "unet.", "transformer.", "lora_unet_", "lora_transformer_")
WRAPPED = ".base_layer"  # how PEFT names a layer beside its adapter
TEXT = ("lora_te", "text_encoder", "cond_stage_model.")
# what a key has that is of another kind of adapter → what that is
OTHERS = {
    "dora_scale": "a DoRA, which also scales the rows of each weight",
    "lora_magnitude_vector": "a DoRA, which also scales the rows of each weight",
    "lokr_": "a LoKr (Kronecker products)",
    "hada_": "a LoHa (Hadamard products)",
    "lora_mid": "a LoCon with a Tucker core (lora_mid)",
    "oft_": "an OFT (rotations)",
    "vera_": "a VeRA (shared random matrices)",
    ".on_input": "an IA³ (scales of inputs)",
}
SHOWN = 3  # keys in a message


class Unmapped(ValueError):
    """Report keys of a file that mean no layer of the network."""

    def __init__(self, source: str, keys: list[str], of: int) -> None:
        super().__init__(
            f"{source}: {len(keys)} of its {of} keys mean no layer of this model ({some_of(keys, SHOWN)}). "
            "Name the base that it was made for."
        )
        self.keys = keys


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with weights by their paths, without the wrappers that PEFT put around some."""
    layers = {}
    for name, module in network.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor) and ".lora_" not in name:
            layers[name.removesuffix(WRAPPED)] = module if name.endswith(WRAPPED) else layers.get(name, module)
    return layers


def check_kind(source: str, keys: Iterable[str]) -> None:
    """Refuse (ValueError) a file for text encoders, or of another kind than LoRA."""
    keys = list(keys)
    for mark, what in OTHERS.items():
        if any(mark in key for key in keys):
            raise ValueError(f"{source} is {what}: only LoRA files, W + BA and shifts of biases, are read.")
    if text := [key for key in keys if key.startswith(TEXT)]:
        raise ValueError(
            f"{source} also changes a text encoder ({len(text)} of {len(keys)} keys, such as {text[0]}): the base's "
            "prompts would not be the LoRA's, and no KL of the network's steps counts that. Train or save it without."
        )


def grouped(source: str, tensors: dict[str, Tensor], layers: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Return tensors by layer and by what they are to it; raise `Unmapped` if some key means none."""
    paths = {path: path for path in layers}
    paths |= {path.replace(".", "_"): path for path in paths}
    groups: dict[str, dict[str, Tensor]] = {}
    unmapped = []
    for key, tensor in tensors.items():
        stem, kind = split(key)
        path = paths.get(plain(stem)) if kind else None
        if path is None:
            unmapped.append(key)
        elif kind in groups.setdefault(path, {}):
            raise ValueError(f"{source} has two tensors for the {kind} of {path} ({key}): it is several LoRAs in one.")
        else:
            groups[path][kind] = tensor
    if unmapped:
        raise Unmapped(source, sorted(unmapped), len(tensors))  # a file keeps them in no order
    return groups


def split(key: str) -> tuple[str, str | None]:
    """Return what a key begins with, and what its ending says the tensor is; None for an unknown ending."""
    for ending, kind in ENDINGS.items():
        if match := re.search(rf"({ending})$", key):
            return key[: match.start()], kind
    return key, None


def plain(stem: str) -> str:
    """Return a layer's path as the network has it, or with underscores for its dots."""
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    if ".processor." in stem:  # diffusers once kept the matrices of attention in its processor
        stem = re.sub(r"to_out$", "to_out.0", stem.replace(".processor.", "."))
    return stem
