"""A tiny run on a text model, carried over to the pipelines of other families."""

import shutil

import torch
import yaml
from pipelines import LARGE, saved
from safetensors.torch import load_file, save_file

from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.prior.prior import Prior


def run_on(name, finished, folder):
    """The run as it would be on another family's pipeline, with a control that does something."""
    saved(name, folder / "prior")
    shutil.copytree(finished, folder / "run")
    config = yaml.safe_load((finished / "config.yaml").read_text()) | {"prior": str(folder / "prior")}
    if name in ("DDPM", "DiT"):
        config |= {"prompts": None, "guidance": None, "classes": None if name == "DDPM" else [0, 3]}
    config["size"] = [32, 48] if name in LARGE else None
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    prior = Prior.from_pretrained(folder / "prior", config["size"])
    LoRAControl("dark", ("no", "yes"), prior.denoiser, rank=2).save(folder / "run" / "control")
    weights, draw = folder / "run" / "control" / "control.safetensors", torch.Generator().manual_seed(0)
    save_file({k: v + 0.3 * torch.randn(v.shape, generator=draw) for k, v in load_file(weights).items()}, weights)
    return folder / "run", config
