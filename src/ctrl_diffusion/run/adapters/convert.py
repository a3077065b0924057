"""Convert the names of a model's first code, SDXL's and Flux's, by the converters of diffusers."""

import diffusers
import torch
from torch import Tensor, nn

from ...prior.parts import quiet
from .names import ALPHA, DOWN, UP, Unmapped, grouped, layers_of, split

KEPT = 1e-3  # of the squared norm of BA: what rounding and nothing else may change


def converted(
    source: str, tensors: dict[str, Tensor], network: nn.Module, pipeline: str, error: Unmapped
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return tensors by layer, as `grouped` does, by names that a pipeline's class of diffusers converts; and a note.

    Its converters drop what they do not know with a warning at most: they are given pairs of matrices alone, α
    multiplied in, and the squared norm of all BA must stay. Raises the `error` where they do not help.
    """
    loader = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
    pairs: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        stem, kind = split(key)
        pairs.setdefault(stem, {})[kind or ""] = (key, tensor)
    if loader is None or any(set(pair) - {ALPHA} != {DOWN, UP} for pair in pairs.values()):
        raise error
    matrices, before = {}, 0.0
    for pair in pairs.values():
        (down_key, down), (up_key, up) = pair[DOWN], pair[UP]
        scale = float(pair[ALPHA][1]) / len(down) if ALPHA in pair else 1.0
        matrices |= {down_key: down, up_key: scale * up}
        before += squared_norm(down, scale * up)
    config = {"unet_config": network.config} if pipeline.startswith("StableDiffusion") else {}
    try:
        with quiet():
            result = loader(matrices, **config)
        groups = grouped(source, result[0] if isinstance(result, tuple) else result, layers_of(network))
    except Exception as reason:  # each converter has its own
        raise error from reason
    after = sum(squared_norm(parts[DOWN], parts[UP]) for parts in groups.values() if {DOWN, UP} <= set(parts))
    if abs(after - before) > KEPT * before:
        lost = f"loses {(before - after) / before:.1%} of its squared norm"
        raise ValueError(
            f"{source}: the converter of diffusers' {pipeline} {lost}. Save the LoRA with diffusers' names."
        ) from error
    notes = [f"its names were converted by diffusers' {pipeline}"]
    lacking = sum(ALPHA not in pair for pair in pairs.values())
    if lacking == len(pairs):
        return groups, notes  # a header may name it
    if lacking:
        notes.append(f"it names no alpha for {lacking} of its layers: scale 1 is taken, as diffusers does")
    for parts in groups.values():
        parts[ALPHA] = torch.tensor(float(len(parts[DOWN])))  # it is multiplied in: scale 1
    return groups, notes


def squared_norm(down: Tensor, up: Tensor) -> float:
    """Return ‖BA‖², the sum of squares, from the products of A and of B with themselves."""
    down, up = down.flatten(1).double(), up.flatten(1).double()
    return float(torch.sum((down @ down.mT) * (up.mT @ up)))
