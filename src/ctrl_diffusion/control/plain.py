"""Hold a control at one label as an ordinary LoRA, which needs none of our code."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlainLoRA:
    """Hold the matrices of an adapter, W + (α/r) BA, and what is added to the bias of one linear layer.

    What a control adds to the output of a network's time embedding is a shift of the bias of its last layer.
    """

    down: dict[str, Tensor]  # layer → A (r, in) or, of a convolution, (r, in, h, w)
    up: dict[str, Tensor]  # layer → B (out, r) or (out, r, 1, 1)
    scale: float  # α/r
    biased: str  # the layer whose bias is shifted
    bias: Tensor  # (out,), the shift
    shape: tuple[int, int]  # (out, in) of that layer's weight

    @property
    def rank(self) -> int:
        """r; 1 without any matrices."""
        return next((len(matrix) for matrix in self.down.values()), 1)

    @property
    def delta(self) -> Tensor:
        """What is added to the weight of the layer whose bias is shifted (out, in); zero unless it has matrices."""
        if self.biased not in self.down:
            return torch.zeros(self.shape)
        return self.scale * self.up[self.biased] @ self.down[self.biased]

    def bias_alone(self, bias: Tensor) -> "PlainLoRA":
        """Return the LoRA that shifts the bias by another amount (out,) and has no matrices."""
        return replace(self, down={}, up={}, scale=1.0, bias=bias)
