"""Draw noise from seeded streams: the same values on every device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .denoise import Denoiser

EVERY = slice(None)
Generators = torch.Generator | Sequence[torch.Generator]  # of all rows together, or one for each


def normal(
    shape: Sequence[int], like: Tensor | Denoiser, generator: Generators | None = None, rows: slice = EVERY,
) -> Tensor:  # fmt: skip
    """Draw standard normal noise of a shape and return some of its rows on the device of `like`.

    Of several generators each draws a row, the one it would draw alone.
    """
    if isinstance(generator, Sequence):
        return torch.cat([normal((1, *shape[1:]), like, each) for each in generator])[rows]
    dtype = like.dtype if isinstance(like, Tensor) else None
    source = generator.device if generator else "cpu"  # so that a seed gives the same values on every device
    return torch.randn(*shape, generator=generator, dtype=dtype, device=source)[rows].to(like.device)


def generators_of(generator: Generators, rows: slice) -> Generators:
    """Return a generator of all rows as it is, or of one for each row those of some rows."""
    return generator if isinstance(generator, torch.Generator) else generator[rows]


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return an independent random stream for a purpose."""
    state = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
