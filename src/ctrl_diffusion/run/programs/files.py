"""Write a control's files for other programs: one for every value, or an adapter and a slider for y on a scale."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...chain.schedule import Schedule, bisect
from ...control.control import Control
from ...control.plain import PlainLoRA
from ...system.files import write_tensors
from .table import FLUX, PROGRAMS, SD, SD3, SDXL

SLIDER = "slider"
SD2, SD2_WIDTH = "sd_v2", 1024  # of its text encoder's states, which tells it from SD 1


@dataclass(frozen=True)
class ControlFiles:
    """Hold the files of one control, by name, as a README shows them."""

    name: str
    files: dict[str, str]  # the value → the file
    slider: str  # the file of a control on a scale; "" of one of classes
    ends: tuple[str, str]  # the values of the slider at strength 0 and 1
    deviation: float  # how far the embedding of a level lies from the slider's line, of the way between the ends
    span: tuple[float, float] | None  # the shares of the way from noise to data between which it speaks
    timesteps: tuple[float, float] | None  # the network's, between which it speaks

    @property
    def identifier(self) -> str:
        """The control's name as Python and PEFT take it."""
        return re.sub(r"\W", "_", f"_{self.name}" if self.name[:1].isdigit() else self.name)


def write_files(
    folder: Path, controls: Sequence[Control], network: nn.Module, schedule: Schedule, base: str, gamma: float,
    programs: Sequence[str],
) -> list[ControlFiles]:  # fmt: skip
    """Write the files of controls on a pipeline's class for some programs; return what there is."""
    layouts = {PROGRAMS[name].folder: PROGRAMS[name].layouts[base] for name in programs}
    written, taken = [], set()
    for control in controls:
        loras, names, deviation = plain_loras(control, gamma), {}, 0.0
        if control.scale:
            deviation = deviation_of(control, gamma)
        for value, lora in loras.items():
            part = f"{control.name}-{value}" if value else control.name
            names[value] = file_name(part, taken)
            about = metadata(control, value, lora, network, base, gamma) | {"ss_output_name": names[value]}
            for kind, layout in layouts.items():
                write_tensors(folder / kind / f"{names[value]}.safetensors", layout(lora, network), about)
        slider = names.pop(SLIDER) if control.scale else ""
        ends = (control.values[0], control.values[-1])
        written.append(ControlFiles(control.name, names, slider, ends, deviation, *spans(control.interval, schedule)))
    return written


def adapted_layers(controls: Iterable[Control], gamma: float) -> list[str]:
    """List the layers that controls adapt, by their paths; refuse (ValueError) a control that is no LoRA."""
    return [layer for control in controls for layer in control.as_lora(0, gamma).down]


def plain_loras(control: Control, gamma: float) -> dict[str, PlainLoRA]:
    """Return the LoRA of every value of a control; of one on a scale "", at its first level, and the slider's."""
    if not control.scale:
        return {value: control.as_lora(y, gamma) for y, value in enumerate(control.values)}
    first, last = control.as_lora(0.0, gamma), control.as_lora(float(control.size - 1), gamma)
    return {"": first, SLIDER: first.bias_alone(last.bias - first.bias)}


def deviation_of(control: Control, gamma: float) -> float:
    """Return the largest distance of a level's embedding from the line between the ends, over the line's length."""
    biases = torch.stack([control.as_lora(float(y), gamma).bias for y in range(control.size)])
    line = torch.lerp(biases[0], biases[-1], torch.linspace(0, 1, len(biases))[:, None].to(biases))
    length = float((biases[-1] - biases[0]).norm())
    return float((biases - line).norm(dim=1).max()) / max(length, 1e-12)


def file_name(text: str, taken: set[str]) -> str:
    """Return a text as a file name that A1111's `<lora:NAME:1>` can hold, and no other file has on any system."""
    stem = re.sub(r"[^\w.+-]+", "_", text)
    name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 2 + len(taken)))) if n.casefold() not in taken)
    taken.add(name.casefold())
    return name


def metadata(
    control: Control, value: str, lora: PlainLoRA, network: nn.Module, base: str, gamma: float
) -> dict[str, str]:
    """Return a file's header: what the programs read of the base model, and what the file is."""
    version = base_model(network.config, base)
    about = {
        "ss_base_model_version": version, "ss_network_module": "networks.lora", "ss_network_dim": str(lora.rank),
        "ss_network_alpha": f"{lora.scale * lora.rank:g}", "ctrl_control": control.name, "ctrl_gamma": f"{gamma:g}",
    }  # fmt: skip
    if version == SD2:
        about["ss_v2"] = "True"
    if control.scale and value == SLIDER:
        about |= {"ctrl_at_strength_0": control.values[0], "ctrl_at_strength_1": control.values[-1]}
    else:
        about["ctrl_value"] = value or control.values[0]
    if control.interval:
        about["ctrl_interval"] = " ".join(f"{sigma:g}" for sigma in control.interval)
    return about


def base_model(config: Any, base: str) -> str:
    """Return what kohya's files call a base model, else its class: A1111 hides a file of SDXL that does not say so."""
    if base != SD:
        return {SDXL: "sdxl_base_v1-0", SD3: "sd3", FLUX: "flux1"}.get(base, base)
    return SD2 if config.cross_attention_dim == SD2_WIDTH else "sd_v1"


def spans(
    interval: tuple[float, float] | None, schedule: Schedule
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Return an interval of noise levels as shares of the way from noise, as ComfyUI counts, and as timesteps."""
    if interval is None:
        return None, None
    times = [
        bisect(lambda t, sigma=sigma: float(schedule(schedule.shifted(t))[1]) >= sigma, 0.0, 1.0) for sigma in interval
    ]
    off, on = times
    whole = float(schedule.timestep(1.0))
    even = [1 - float(schedule.timestep(t)) / whole for t in (on, off)]
    return tuple(even), tuple(float(schedule.timestep(schedule.shifted(t))) for t in (off, on))
