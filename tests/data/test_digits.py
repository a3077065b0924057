"""The rulers' cuts are those of scikit-learn's digits."""

import torch

from ctrl_diffusion.data.digits import INK_CUTS, SLANT_CUT, UPRIGHT, digits, ink, ink_ruler, slant, slant_ruler


def test_the_cuts_are_quartiles_of_ink_and_the_median_slant():
    x, c = digits()
    quartiles = torch.quantile(ink(x), torch.tensor([0.25, 0.5, 0.75]))
    leaning = slant(x[torch.isin(c, torch.tensor(UPRIGHT))])

    assert torch.equal(quartiles, torch.tensor(INK_CUTS))  # multiples of 1/1024: exact in float32
    assert torch.equal(ink_ruler(x), torch.bucketize(ink(x), quartiles, right=True))
    # a sum over 64 pixels may be added in another order elsewhere: the cut is the median to its rounding
    assert abs(leaning.median().item() - SLANT_CUT) < 64 * torch.finfo(torch.float32).eps
    assert torch.equal(slant_ruler(x), (slant(x) > SLANT_CUT).long())
