"""Say which programs read a control's files: one row a program, with the models for which it does."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from .layouts import Layout, dotted, kohya, peft

SD, SDXL, SD3, FLUX = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
)  # fmt: skip
UNETS, TRANSFORMERS = (SD, SDXL), (SD3, FLUX)
AURA, Z_IMAGE = "AuraFlowPipeline", "ZImagePipeline"
# of programs whose sources were read for the models above alone
UNREAD = dict.fromkeys(
    (AURA, Z_IMAGE, "PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    "what it reads of a LoRA of this model was not looked up",
)
ALL = "all"
# layers that ComfyUI and A1111 map, by their paths in diffusers' networks
TRANSFORMER = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
    r"|norm1(_context)?\.linear)|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
    r"|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]|context_embedder"
)
UNET = (
    r"((down|up)_blocks\.\d+|mid_block)\.(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|attentions\.\d+\."
    r"(proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))))"
    r"|time_embedding\.linear_[12]"
)


@dataclass(frozen=True)
class Program:
    """Describe a program that loads LoRA files."""

    title: str
    layouts: dict[str, Layout]  # the class of a pipeline → how its weights are named
    folder: str  # of an exported folder, in which its files are
    by_step: bool = True  # whether it can apply a LoRA on some of the steps
    lacks: dict[str, str] = field(default_factory=dict)  # the class of a pipeline → why it cannot take its controls
    maps: dict[str, str] = field(default_factory=dict)  # the same → the paths of the layers that it knows, if not all

    def reason(self, base: str, layers: Collection[str] = ()) -> str:
        """Return why a control of a pipeline's class on some layers cannot be used in it; "" if it can."""
        if base not in self.layouts:
            return self.lacks.get(base, f"it loads no LoRA of a {base}")
        unread = [layer for layer in layers if not re.fullmatch(self.maps.get(base, ".*"), layer)]
        others = f" and {len(unread) - 1} more" if unread[1:] else ""
        return f"it does not map {unread[0]}{others}, which lora_targets adapted" if unread else ""


LORA, DIFFUSERS = "lora", "diffusers"
NAMED = {base: kohya for base in UNETS}
PROGRAMS = {
    "diffusers": Program(
        "diffusers",
        {base: peft("unet") for base in UNETS} | dict.fromkeys((*TRANSFORMERS, AURA, Z_IMAGE), peft("transformer")),
        DIFFUSERS,
    ),
    "comfyui": Program(
        "ComfyUI", NAMED | {base: dotted for base in TRANSFORMERS}, LORA, lacks=UNREAD,
        maps={base: UNET for base in UNETS} | {base: TRANSFORMER for base in TRANSFORMERS},
    ),
    "a1111": Program(
        "A1111 and Forge", NAMED, LORA, by_step=False,
        lacks=UNREAD
        | {SD3: "it maps the attention of SD 3 alone, not its time embedding", FLUX: "it does not run Flux"},
        maps={base: UNET for base in UNETS},
    ),
    "invokeai": Program(
        "InvokeAI", NAMED, LORA, by_step=False,
        lacks=UNREAD | {SD3: "it reads no LoRA of SD 3", FLUX: "it takes matrices alone of a LoRA of Flux, no bias"},
    ),
}  # fmt: skip


def chosen(names: Iterable[str], base: str, layers: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Return the programs asked for that take controls of a pipeline's class, and a line on each other of "all".

    `layers` are those that the controls adapt.

    Raises:
        ValueError: an unknown program, one that cannot take them, or of "all" not one that can.
    """
    names = list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in (*PROGRAMS, ALL)]:
        raise ValueError(f"--for {unknown[0]}: must be one of {', '.join(PROGRAMS)}, {ALL}.")
    reasons = {name: PROGRAMS[name].reason(base, layers) for name in (PROGRAMS if ALL in names else names)}
    able, others = [name for name in reasons if not reasons[name]], [name for name in reasons if reasons[name]]
    lines = [f"not for {name}: {reasons[name]}" for name in others]
    if others and (ALL not in names or not able):
        advice = "The exported folder itself is loaded by diffusers, with trust_remote_code=True: leave --for out."
        raise ValueError(f"--for {others[0]}: {reasons[others[0]]}. {advice}")
    return able, lines
