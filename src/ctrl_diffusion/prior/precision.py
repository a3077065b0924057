"""Compute a network in half precision: by autocast, or because its weights are stored so."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 2.0**10


class MixedPrecision:
    """Hold the precision in which a denoiser's `network` computes; x̂ keeps the precision of x_t."""

    network: nn.Module
    precision: torch.dtype | None  # of autocast; None for the precision of the weights
    loss_scale: float  # above 1 in float16, which has no numbers below 6e-8; bfloat16 has the range of float32

    def set_precision(self, precision: torch.dtype | None) -> None:
        """Autocast to another precision from now on, with a fresh loss scale."""
        self.precision = precision
        self.loss_scale = LOSS_SCALE if torch.float16 in (precision, self.stored) else 1.0

    @property
    def stored(self) -> torch.dtype | None:
        """The half precision in which the weights are stored; None if it is not half."""
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)
        return dtype if dtype in (torch.float16, torch.bfloat16) else None

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Compute in the precision of the weights inside, without autocast and TF32."""
        self.precision, before = None, self.precision
        # PyTorch lets convolutions of float32 run on TF32 cores, which keep ten bits, as float16 does
        units = torch.backends.cudnn, torch.backends.cuda.matmul
        allowed = [unit.allow_tf32 for unit in units]
        try:
            for unit in units:
                unit.allow_tf32 = False
            yield
        finally:
            self.precision = before
            for unit, tf32 in zip(units, allowed, strict=True):
                unit.allow_tf32 = tf32
