import pytest
import torch

from ctrl_diffusion.commands.jobs import demo
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.reward.fit import half_turn


def test_slant_is_the_slope_of_a_stroke():
    """A thin line a pixel to the right for each two up, its mirror image, its half turn, and an upright one."""
    line = torch.full((1, 1, 8, 8), -1.0)
    for row in range(8):
        line[0, 0, row, (7 - row) // 2 + 2] = 1.0
    # columns floor(h/2) of heights h = 0 … 7: the least-squares slope, from the sums
    heights = torch.arange(8.0)
    columns = (heights / 2).floor()
    h = heights - heights.mean()
    slope = float((h * columns).sum() / (h * h).sum())
    assert float(rulers.slant(line)) == pytest.approx(slope, abs=1e-6)
    assert float(rulers.slant(line.flip(-1))) == pytest.approx(-slope, abs=1e-6)
    assert float(rulers.slant(line.flip(-1, -2))) == pytest.approx(slope, abs=1e-6)
    upright = torch.full((1, 1, 8, 8), -1.0)
    upright[..., 3] = 1.0
    assert float(rulers.slant(upright)) == pytest.approx(0, abs=1e-6)
    assert float(rulers.slant(torch.full((1, 1, 8, 8), -1.0))) == 0.0, "an empty sheet does not lean"


def test_what_slants_goes_on_slanting_after_half_a_turn():
    x = demo.labelled_digits("ink,slant", 0)[1][0].x
    torch.manual_seed(0)
    turned = half_turn(x)
    assert 0.3 < float((turned != x).flatten(1).any(1).float().mean()) < 0.7
    torch.testing.assert_close(rulers.slant(turned), rulers.slant(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_datasets_of_several_controls_share_no_image(seed):
    """Nor do the panels' share any with them; each is even over its classes."""
    (ink, of_ink), (slant, of_slant) = demo.labelled_digits("ink,slant", seed)
    assert (len(ink), len(slant)) == (250, 250)
    assert list(slant.labels) == ["slant"], "y depends on x alone"
    kept = [{tuple(row) for row in data.x.flatten(1).tolist()} for data in (ink, slant, of_ink, of_slant)]
    assert not kept[0] & kept[1]
    assert not (kept[0] | kept[1]) & (kept[2] | kept[3])
    assert set(ink.labels["digit"].tolist()) == set(rulers.UPRIGHT)
    assert torch.equal(rulers.slant_ruler(slant.x), slant.labels["slant"])
    counts = slant.labels["slant"].bincount()
    assert counts.max() - counts.min() <= 2
