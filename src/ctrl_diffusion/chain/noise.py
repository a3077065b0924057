"""Draw noise from seeded streams: the same values on every device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .denoise import Denoiser

EVERY = slice(None)


def normal(
    shape: Sequence[int], like: Tensor | Denoiser, generator: torch.Generator | None = None, rows: slice = EVERY
) -> Tensor:
    """Standard normal noise where `like` is, drawn where the generator is: a seed means the same on every device.

    Some rows of it are what they are among all.
    """
    dtype = like.dtype if isinstance(like, Tensor) else None
    source = generator.device if generator else "cpu"
    return torch.randn(*shape, generator=generator, dtype=dtype, device=source)[rows].to(like.device)


def stream(seed: int, purpose: str) -> torch.Generator:
    """An independent random stream for each purpose."""
    state = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))
