"""Read a LoRA file onto the layers of a network: what it adds to each weight and bias."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...prior.source import PICKLES
from ...system.files import one_line, read_tensors, some_of
from .convert import converted
from .names import ALPHA, BIAS, DOWN, FULL, SHOWN, UP, UP_BIAS, Unmapped, check_kind, grouped, layers_of, split

METADATA, CONFIG = "lora_adapter_metadata", "adapter_config.json"  # of diffusers in the header, of PEFT beside the file


@dataclass(frozen=True)
class Adapter:
    """Hold what a LoRA file adds to a network, by the paths of its layers, at strength 1; float32."""

    source: str
    weights: dict[str, Tensor]  # in the shape of each layer's weight
    biases: dict[str, Tensor]  # (out,)
    ranks: tuple[int, ...]  # different ones, in rising order; none of full differences alone
    numbers: int  # how many the file has
    notes: tuple[str, ...] = ()  # what was assumed, a line each

    @property
    def norm(self) -> float:
        """The root of the sum of squares of all that is added."""
        return math.sqrt(sum(float(t.square().sum()) for t in (*self.weights.values(), *self.biases.values())))

    def metrics(self) -> dict[str, Any]:
        """Return the figures by the names certify.json uses."""
        return {
            "file": self.source, "layers": len(self.weights), "biases": len(self.biases), "ranks": list(self.ranks),
            "numbers": self.numbers, "norm": self.norm, "notes": list(self.notes),
        }  # fmt: skip


def read_adapter(path: Path, network: nn.Module, pipeline: str = "") -> Adapter:
    """Read a LoRA file for a network of a pipeline's class, whose converters of diffusers serve names it does not have.

    Raises:
        ValueError: no safetensors file, of another kind or another base, for a text encoder, empty or not finite.
    """
    tensors, header = read_file(path)
    source = str(path)
    check_kind(source, tensors)
    if not any(split(key)[1] in (DOWN, UP, FULL, BIAS) for key in tensors):
        names = some_of(list(tensors), SHOWN) or "it is empty"
        raise ValueError(f"{source} is no LoRA: none of its {len(tensors)} tensors has the name of one ({names}).")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source} is damaged: {key} has numbers that are not finite.")
    layers = layers_of(network)
    try:
        groups, notes = grouped(source, tensors, layers), []
    except Unmapped as error:
        groups, notes = converted(source, tensors, network, pipeline, error)
    settings, named = settings_of(path, header)
    weights, biases, ranks, assumed = {}, {}, set(), 0
    for layer, parts in groups.items():
        module, where = layers[layer], f"{source}: {layer}"
        if (DOWN in parts) != (UP in parts) or (DOWN not in parts and {ALPHA, UP_BIAS} & set(parts)):
            raise ValueError(f"{where} has {' and '.join(sorted(parts))}, and lacks the other matrix. Save it again.")
        if DOWN in parts:
            rank = len(parts[DOWN])
            ranks.add(rank)
            alpha = float(parts[ALPHA]) if ALPHA in parts else settings.alpha(layer, rank)
            assumed += alpha is None
            scale = settings.scale(rank if alpha is None else alpha, rank)
            weights[layer] = scale * product(parts[DOWN], parts[UP], module.weight, where)
            if UP_BIAS in parts and parts[UP_BIAS].any():  # PEFT writes one for every layer, ours but one of zeros
                biases[layer] = scale * added(parts[UP_BIAS], module, where)
        if FULL in parts:
            weights[layer] = weights.get(layer, 0) + fitted(parts[FULL], module.weight, where)
        if BIAS in parts:
            biases[layer] = biases.get(layer, 0) + shift(parts[BIAS], module, where)
    if assumed:
        notes.append(f"it names no alpha for {assumed} of its layers: scale 1 is taken, as diffusers does")
    elif named:
        notes.append(f"its scale is that of {named}")
    count = sum(tensor.numel() for tensor in tensors.values())
    return Adapter(source, weights, biases, tuple(sorted(ranks)), count, tuple(notes))


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file as float32, and its header; refuse (ValueError) any other file."""
    if path.is_dir():
        raise ValueError(f"--lora {path} is a folder. Name the .safetensors file in it.")
    if not path.is_file():
        raise ValueError(f"--lora {path}: there is no such file.")
    if path.suffix in PICKLES:
        raise ValueError(f"--lora {path} is a pickle, which can run any code. Save it as .safetensors.")
    try:
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"--lora {path} is no safetensors file: {one_line(error, 100)}.") from error
    return {key: tensor.float() for key, tensor in tensors.items()}, header


@dataclass(frozen=True)
class Settings:
    """Hold what a file's header, or PEFT's config beside it, says of the scale."""

    values: dict[str, Any]

    def alpha(self, layer: str, rank: int) -> float | None:
        """Return α of a layer; None where nothing says it."""
        for pattern, alpha in (self.values.get("alpha_pattern") or {}).items():
            if layer == pattern or layer.endswith(f".{pattern}"):
                return float(alpha)
        alpha = self.values.get("lora_alpha")
        return None if alpha is None else float(alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """Return α/r, or α/√r of a rank-stabilised LoRA (Kalajdzievski 2023)."""
        return alpha / math.sqrt(rank) if self.values.get("use_rslora") else alpha / rank


def settings_of(path: Path, header: dict[str, str]) -> tuple[Settings, str]:
    """Read a file's settings and say where they are from; empty if there are none."""
    if text := header.get(METADATA):
        values = parsed(text, f"{path}: {METADATA} in its header")
        for prefix in ("unet.", "transformer."):
            values = {key.removeprefix(prefix): value for key, value in values.items()}
        return Settings(values), "its header"
    beside = path.parent / CONFIG
    if path.name == "adapter_model.safetensors" and beside.is_file():
        values = parsed(beside.read_text(encoding="utf-8"), str(beside))
        if values.get("use_dora") or values.get("bias", "none") != "none":
            raise ValueError(f"{beside}: DoRA and trained biases (bias: {values.get('bias')}) are not read.")
        return Settings(values), str(beside)
    return Settings({}), ""


def parsed(text: str, where: str) -> dict[str, Any]:
    """Return the settings in JSON text; refuse (ValueError) any other text."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is damaged: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be settings by name, got {type(values).__name__}.")
    return values


def product(down: Tensor, up: Tensor, weight: Tensor, where: str) -> Tensor:
    """Return BA in the shape of a layer's weight, of linear layers (r, in), (out, r) and of convolutions."""
    if up.flatten(1).shape[1] != len(down):
        raise ValueError(f"{where} has matrices {tuple(down.shape)} and {tuple(up.shape)}, which do not multiply.")
    return fitted((up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:]), weight, where)


def fitted(delta: Tensor, weight: Tensor, where: str) -> Tensor:
    """Return a difference in the shape of a weight; refuse (ValueError) one for another shape."""

    def bare(shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape) if len(shape) < 4 or tuple(shape[2:]) != (1, 1) else tuple(shape[:2])

    if bare(delta.shape) != bare(weight.shape):
        shapes = " and the base ".join(" × ".join(map(str, shape)) for shape in (delta.shape, weight.shape))
        raise ValueError(f"{where} has {shapes}: it was made for another base. Name that one.")
    return delta.view(weight.shape)


def added(delta: Tensor, module: nn.Module, where: str) -> Tensor:
    """Return what is added to a layer's output, which need not have a bias; refuse (ValueError) another width."""
    if isinstance(getattr(module, "bias", None), Tensor):
        return shift(delta, module, where)
    return fitted(delta, module.weight.flatten(1)[:, 0], where)  # (out,)


def shift(delta: Tensor, module: nn.Module, where: str) -> Tensor:
    """Return a difference of a bias; refuse (ValueError) one where the layer has none, or another."""
    if not isinstance(getattr(module, "bias", None), Tensor):
        raise ValueError(f"{where} has a shift of a bias, and that layer of the base has no bias. Name another base.")
    return fitted(delta, module.bias, where)
