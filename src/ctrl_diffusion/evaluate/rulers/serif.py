"""Ask the judge of serif that ships with the package, a classifier fitted on many other font families."""

from functools import lru_cache

import torch
from torch import Tensor

from ...data.labels import NULL
from ...data.letters.rulers import EMPTY, paper_of
from ...data.letters.sets import JUDGE
from ...reward.scorer import Classifier, Scorer


@lru_cache
def judge() -> Scorer:
    """Read the judge."""
    return Classifier.load(JUDGE)


@torch.no_grad()
def serif(x: Tensor, c: Tensor) -> Tensor:
    """Return the class, as SERIFS numbers it, that the judge sees in letters c (n,) in x (n, C, 32, 32), or NULL."""
    paper = paper_of(x)
    seen = judge().log_prob(2 * paper.unsqueeze(1) - 1, c).argmax(1)
    return torch.where(paper.mean((1, 2)) > EMPTY, seen, NULL)
