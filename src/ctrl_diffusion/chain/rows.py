"""Cut batches into rows and micro-batches."""

import torch
from torch import Tensor


def parts(n: int, most: int | None) -> list[slice]:
    """Rows 0 … n − 1 in slices of `most`; None for all at once."""
    return [slice(start, min(start + (most or n), n)) for start in range(0, n, most or n)]


def rows_of(values: dict[str, Tensor], rows: slice | Tensor) -> dict[str, Tensor]:
    """Some rows of each."""
    return {name: value[rows] for name, value in values.items()}


def alike(labels: dict[str, Tensor], cond: dict[str, Tensor]) -> list[Tensor]:
    """Which of n rows ask for the same (c, y): the rows of each."""
    columns = [row.reshape(len(row), -1) for row in (*labels.values(), *cond.values())]
    _, pair = torch.cat(columns, dim=1).unique(dim=0, return_inverse=True)
    return [(pair == p).nonzero().squeeze(1) for p in range(int(pair.max()) + 1)]
