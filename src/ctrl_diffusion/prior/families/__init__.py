"""Describe model families, one file each: what to read of a pipeline, and where a control enters it."""

from typing import Any

from . import aura_flow, dit, flux, pixart, stable_diffusion, stable_diffusion_3, unet, z_image

# the class of a pipeline → its family, a module or any object with
#     load(pipeline, size) -> Family
#     PARTS     names of the parts it needs, the network first
#     OPTIONAL  names of parts that may be left out
#     ALONE     whether these parts will do; else the whole pipeline is loaded, because it encodes text
# A row may be added from anywhere: FAMILIES["MyPipeline"] = my_family
FAMILIES: dict[str, Any] = {
    "DDPMPipeline": unet,
    "DDIMPipeline": unet,
    "DiTPipeline": dit,
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
    "PixArtAlphaPipeline": pixart,
    "PixArtSigmaPipeline": pixart,
    "AuraFlowPipeline": aura_flow,
    "ZImagePipeline": z_image,
}
PARTS = tuple(dict.fromkeys(part for family in FAMILIES.values() for part in (*family.PARTS, *family.OPTIONAL)))
