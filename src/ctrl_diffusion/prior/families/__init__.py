"""Model families, one file each: what is read of a pipeline, and where a control enters it."""

from types import ModuleType

from . import dit, flux, stable_diffusion, stable_diffusion_3, unet

# name of the pipeline's class → the file that knows it, with `load(pipeline, size) -> Family` and `ALONE`: the part its
# network is in, where that and the scheduler will do; None where the whole pipeline is needed, to encode text
FAMILIES: dict[str, ModuleType] = {
    "DDPMPipeline": unet,
    "DDIMPipeline": unet,
    "DiTPipeline": dit,
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": stable_diffusion,
    "StableDiffusion3Pipeline": stable_diffusion_3,
    "FluxPipeline": flux,
}
