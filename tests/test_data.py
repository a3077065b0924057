import numpy as np
import pytest
import torch
from PIL import Image

from ctrl_diffusion import demo
from ctrl_diffusion.data import Conditions, LabelledImages, read_imagefolder, to_pixels, write_imagefolder

VALUES = {"digit": tuple("0123456789"), "ink": tuple("1234")}


def test_imagefolder_round_trip(tmp_path):
    data = demo.offline_dataset(seed=0)
    write_imagefolder(tmp_path, data)
    assert (tmp_path / "metadata.csv").read_text().splitlines()[0] == "file_name,digit,ink"
    back = read_imagefolder(tmp_path, VALUES, channels=1)
    # a byte is 2/255 wide
    torch.testing.assert_close(back.x, data.x, rtol=0, atol=1 / 255 + 1e-6)
    for name in VALUES:
        assert torch.equal(back.labels[name], data.labels[name])


def test_the_ink_classes_are_even_and_seen_by_the_ruler():
    data = demo.offline_dataset(seed=1)
    assert len(data) == 500
    counts = data.labels["ink"].bincount()
    # cut at the quartiles of 1,797 digits, many with equal ink: even up to ties
    assert counts.min() >= 115
    assert counts.max() <= 135
    assert torch.equal(demo.ink_ruler(data.x), data.labels["ink"])


def test_the_augmentation_keeps_the_ink():
    x = demo.offline_dataset(seed=0).x
    moved = demo.any_side_up(x)
    assert not torch.equal(moved, x)
    torch.testing.assert_close(demo.ink(moved), demo.ink(x))


def test_splits_are_disjoint_stratified_and_seeded():
    data = demo.offline_dataset(seed=0)
    tagged = LabelledImages(torch.arange(500.0).view(-1, 1, 1, 1), data.labels, data.values)
    parts = tagged.split("ink", seed=3)
    assert [len(part) for part in parts] == [350, 75, 75]
    assert sorted(torch.cat([part.x.flatten() for part in parts]).tolist()) == list(range(500))
    whole = data.labels["ink"].bincount() / 500
    for part in parts:
        assert float((part.labels["ink"].bincount() - whole * len(part)).abs().max()) < 1
    again = tagged.split("ink", seed=3)
    assert all(torch.equal(a.x, b.x) for a, b in zip(parts, again, strict=True))
    with pytest.raises(ValueError, match="cannot be split"):
        tagged[torch.arange(400)].split("ink")


def write(folder, rows, size=(8, 8)):
    Image.fromarray(np.zeros(size, np.uint8)).save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,digit,ink\n" + "\n".join(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["a.png,3,5"], "line 2: ink must be one of 1, 2, 3, 4, got '5'"),
        (["a.png,3,1", "a.png,3,"], "line 3: ink must be one of"),
        (["a.png,ten,1"], "line 2: digit"),
        (["b.png,3,1"], "line 2: cannot read the image 'b.png'"),
        (["broken.png,3,1"], "line 2: cannot read the image 'broken.png'"),
        (["a.png,3,1", "wide.png,3,1"], "mixes image sizes"),
    ],
)
def test_bad_folders_are_named_line_by_line(tmp_path, rows, message):
    write(tmp_path, rows)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=message):
        read_imagefolder(tmp_path, VALUES, channels=1)


def test_missing_table_and_column(tmp_path):
    with pytest.raises(ValueError, match=r"no metadata\.csv"):
        read_imagefolder(tmp_path, VALUES, channels=1)
    write(tmp_path, ["a.png,3,1"])
    with pytest.raises(ValueError, match="slant"):
        read_imagefolder(tmp_path, {"slant": ("1", "2")}, channels=1)


def test_nan_in_data_is_refused():
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 0, 1] = float("nan")
    with pytest.raises(ValueError, match="image 1 holds NaN"):
        LabelledImages(x, {}, {})


def test_pixels_are_rounded_and_clipped():
    assert to_pixels(torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 2, 2)).flatten().tolist() == [0, 0, 128, 255]
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_conditions_number_every_pair():
    conditions = Conditions({"c": torch.tensor([7, 8, 9])}, "ink", 4)
    labels, cond = conditions.of(conditions.all(2))
    assert conditions.pairs == 12
    pairs = list(zip(cond["c"].tolist(), labels["ink"].tolist(), strict=True))
    assert pairs == [(c, y) for c in (7, 8, 9) for y in range(4) for _ in range(2)]
    drawn = conditions.draw(30, torch.Generator().manual_seed(0)).bincount(minlength=12)
    assert drawn.min() >= 2
    assert drawn.max() <= 3
