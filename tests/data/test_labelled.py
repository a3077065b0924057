import pytest
import torch

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.labelled import LabelledImages, to_pixels


def test_the_ink_classes_are_even_and_seen_by_the_ruler():
    data = labelled_digits("ink", 1)[0][0]
    assert len(data) == 500
    counts = data.labels["ink"].bincount()
    # cut at the quartiles of 1,797 digits, many with equal ink: even up to ties
    assert counts.min() >= 115
    assert counts.max() <= 135
    assert torch.equal(rulers.ink_ruler(data.x), data.labels["ink"])


@pytest.mark.parametrize("shares", [(0.7, 0.15, 0.15), (0.4, 0.1, 0.15, 0.35)])
def test_splits_are_disjoint_stratified_and_seeded(shares):
    data = labelled_digits("ink", 0)[0][0]
    tagged = LabelledImages(torch.arange(500.0).view(-1, 1, 1, 1), data.labels, data.values)
    parts = tagged.split("ink", shares, seed=3)
    assert [len(part) for part in parts] == [round(500 * share) for share in shares]
    assert sorted(torch.cat([part.x.flatten() for part in parts]).tolist()) == list(range(500))
    whole = data.labels["ink"].bincount() / 500
    for part in parts:
        assert float((part.labels["ink"].bincount() - whole * len(part)).abs().max()) < 1
    again = tagged.split("ink", shares, seed=3)
    assert all(torch.equal(a.x, b.x) for a, b in zip(parts, again, strict=True))


def test_a_class_nobody_could_learn_is_refused():
    data = labelled_digits("ink", 0)[0][0]
    with pytest.raises(ValueError, match=r"all 123 examples have ink = '1'. A control needs two classes"):
        LabelledImages(data.x[:123], {"ink": torch.zeros(123, dtype=torch.long)}, {"ink": ("1",)}).split("ink")
    rare = torch.cat([(data.labels["ink"] != 2).nonzero(), (data.labels["ink"] == 2).nonzero()[:3]]).squeeze(1)
    with pytest.raises(ValueError, match=r"ink = '3' has 3 example\(s\)"):
        data[rare].split("ink")


def test_nan_in_data_is_refused():
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 0, 1] = float("nan")
    with pytest.raises(ValueError, match="image 1 holds NaN"):
        LabelledImages(x, {}, {})


def test_pixels_are_rounded_and_clipped():
    assert to_pixels(torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 2, 2)).flatten().tolist() == [0, 0, 128, 255]
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


class Squares(torch.utils.data.Dataset):
    """As torch has it: x and its labels, one item at a time."""

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return 30

    def __getitem__(self, i):
        x = torch.full((1, 4, 5 if i == self.broken else 4), i / 30)
        return x, i % 3, torch.tensor(i % 2)


def test_a_dataset_of_torch_in_memory():
    data = LabelledImages.from_dataset(Squares(), ("digit", "ink"), {"digit": "abc", "ink": ("light", "heavy")})
    assert data.x.shape == (30, 1, 4, 4)
    assert data.labels["digit"].tolist() == [i % 3 for i in range(30)]
    assert data.values == {"digit": ("a", "b", "c"), "ink": ("light", "heavy")}
    with pytest.raises(ValueError, match="item 7 is not x of one shape followed by digit, ink"):
        LabelledImages.from_dataset(Squares(7), ("digit", "ink"), {"digit": "abc", "ink": "ab"})
    with pytest.raises(ValueError, match="digit must be a class 0 … 1, got 0 … 2"):
        LabelledImages.from_dataset(Squares(), ("digit", "ink"), {"digit": "ab", "ink": "ab"})
    with pytest.raises(ValueError, match="item 0 is not"):
        LabelledImages.from_dataset(Squares(), ("digit",), {"digit": "abc"})


def test_a_scale_is_split_by_its_quarters():
    y = torch.linspace(-0.5, 8.5, 80)
    data = LabelledImages(y.view(-1, 1, 1, 1), {"ink": y}, {"ink": tuple("abcdefghi")})
    for part in data.split("ink", (0.5, 0.25, 0.25)):
        assert data.strata("ink")[torch.isin(y, part.labels["ink"])].bincount().unique().numel() == 1
    with pytest.raises(ValueError, match="ink has 20 examples. Bring at least 40 of a scale"):
        data[torch.arange(20)].split("ink")
