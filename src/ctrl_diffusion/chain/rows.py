"""Cut batches into rows and micro-batches."""

import torch
from torch import Tensor


def parts(n: int, most: int | None) -> list[slice]:
    """Cut rows 0 … n − 1 into slices of at most `most`; None for one slice."""
    return [slice(start, min(start + (most or n), n)) for start in range(0, n, most or n)]


def rows_of(values: dict[str, Tensor], rows: slice | Tensor) -> dict[str, Tensor]:
    """Return some rows of each tensor."""
    return {name: value[rows] for name, value in values.items()}


def equal_rows(labels: dict[str, Tensor], cond: dict[str, Tensor]) -> list[Tensor]:
    """Group n rows by their (c, y): the indices of each group."""
    columns = [row.reshape(len(row), -1) for row in (*labels.values(), *cond.values())]
    _, pair = torch.cat(columns, dim=1).unique(dim=0, return_inverse=True)
    return [(pair == p).nonzero().squeeze(1) for p in range(int(pair.max()) + 1)]
