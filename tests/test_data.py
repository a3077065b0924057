import json

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl_diffusion import demo
from ctrl_diffusion.data import LabelledImages, in_order, read_imagefolder, to_pixels, write_imagefolder

CLASSES = {"digit": {str(c): c for c in range(10)}, "ink": {str(y + 1): y for y in range(4)}}
SHAPE = (1, 8, 8)


def test_imagefolder_round_trip(tmp_path):
    data = demo.labelled_digits("ink", 0)[0][0]
    write_imagefolder(tmp_path, data)
    assert (tmp_path / "metadata.csv").read_text().splitlines()[0] == "file_name,digit,ink"
    back = read_imagefolder(tmp_path, CLASSES, SHAPE)
    # a byte is 2/255 wide
    torch.testing.assert_close(back.x, data.x, rtol=0, atol=1 / 255 + 1e-6)
    assert back.values == data.values
    for name in CLASSES:
        assert torch.equal(back.labels[name], data.labels[name])
    # without being told, the classes are those that occur, numbers in their order, and grey images stay grey
    found = read_imagefolder(tmp_path, {"ink": None})
    assert found.values == {"ink": ("1", "2", "3", "4")}
    assert torch.equal(found.labels["ink"], data.labels["ink"])
    assert torch.equal(found.x, back.x)


def test_the_ink_classes_are_even_and_seen_by_the_ruler():
    data = demo.labelled_digits("ink", 1)[0][0]
    assert len(data) == 500
    counts = data.labels["ink"].bincount()
    # cut at the quartiles of 1,797 digits, many with equal ink: even up to ties
    assert counts.min() >= 115
    assert counts.max() <= 135
    assert torch.equal(demo.ink_ruler(data.x), data.labels["ink"])


@pytest.mark.parametrize("shares", [(0.7, 0.15, 0.15), (0.4, 0.1, 0.15, 0.35)])
def test_splits_are_disjoint_stratified_and_seeded(shares):
    data = demo.labelled_digits("ink", 0)[0][0]
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
    data = demo.labelled_digits("ink", 0)[0][0]
    with pytest.raises(ValueError, match=r"all 123 examples have ink = '1'. A control needs two classes"):
        LabelledImages(data.x[:123], {"ink": torch.zeros(123, dtype=torch.long)}, {"ink": ("1",)}).split("ink")
    rare = torch.cat([(data.labels["ink"] != 2).nonzero(), (data.labels["ink"] == 2).nonzero()[:3]]).squeeze(1)
    with pytest.raises(ValueError, match=r"ink = '3' has 3 example\(s\)"):
        data[rare].split("ink")


def write(folder, rows, size=(8, 8)):
    Image.fromarray(np.zeros(size, np.uint8)).save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,digit,ink\n" + "\n".join(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["a.png,3,5"], "row 1: ink must be one of 1, 2, 3, 4, got '5'"),
        (["a.png,3,1", "a.png,3,"], "row 2: ink is blank. Label it or remove the row."),
        (["a.png,3,1", "a.png,3"], "row 2: ink is blank"),
        (["a.png,ten,1"], "row 1: digit must be one of"),
        (["b.png,3,1"], "row 1: cannot read the image 'b.png'"),
        ([",3,1"], "row 1: cannot read the image ''"),
        (["broken.png,3,1"], "row 1: cannot read the image 'broken.png'"),
        (["text.png,3,1"], "row 1: cannot read the image 'text.png'"),
    ],
)
def test_bad_folders_are_named_row_by_row(tmp_path, rows, message):
    write(tmp_path, rows)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=message):
        read_imagefolder(tmp_path, CLASSES, SHAPE)


def test_missing_table_and_column(tmp_path):
    with pytest.raises(ValueError, match=r"no metadata\.csv or metadata\.jsonl"):
        read_imagefolder(tmp_path, CLASSES, SHAPE)
    write(tmp_path, ["a.png,3,1"])
    with pytest.raises(ValueError, match="no column slant; it has: file_name, digit, ink"):
        read_imagefolder(tmp_path, {"slant": None}, SHAPE)


def test_jsonl_is_read_as_csv_is(tmp_path):
    write(tmp_path, ["a.png,3,1", "a.png,4,2"])
    first = read_imagefolder(tmp_path, CLASSES, SHAPE)
    (tmp_path / "metadata.csv").unlink()
    rows = [{"file_name": "a.png", "digit": 3, "ink": "1"}, {"file_name": "a.png", "digit": 4, "ink": 2}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    second = read_imagefolder(tmp_path, CLASSES, SHAPE)
    for name in CLASSES:
        assert torch.equal(first.labels[name], second.labels[name])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"')
    with pytest.raises(ValueError, match="line 1 cannot be read"):
        read_imagefolder(tmp_path, CLASSES, SHAPE)


def test_images_of_another_size_are_resized_and_it_is_said(tmp_path):
    write(tmp_path, ["a.png,3,1", "wide.png,3,2"])
    Image.fromarray(np.full((8, 9, 3), 255, np.uint8)).save(tmp_path / "wide.png")
    with pytest.warns(UserWarning, match="1 of 2 images are not 8×8 \\(one is 9×8\\): they were resized"):
        data = read_imagefolder(tmp_path, CLASSES, SHAPE)
    assert data.x.shape == (2, *SHAPE)
    torch.testing.assert_close(data.x[1], torch.ones(SHAPE))


def test_a_measurement_is_no_class(tmp_path):
    write(tmp_path, [f"a.png,3,{i / 100}" for i in range(80)])
    with pytest.raises(ValueError, match="ink has 80 different values"):
        read_imagefolder(tmp_path, {"ink": None}, SHAPE)


def test_labels_are_ordered_as_numbers_if_they_are_numbers():
    assert in_order(["10", "9", "1", "9"]) == ("1", "9", "10")
    assert in_order(["10", "9", "low"]) == ("10", "9", "low")


def test_nan_in_data_is_refused():
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 0, 1] = float("nan")
    with pytest.raises(ValueError, match="image 1 holds NaN"):
        LabelledImages(x, {}, {})


def test_pixels_are_rounded_and_clipped():
    assert to_pixels(torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 2, 2)).flatten().tolist() == [0, 0, 128, 255]
    assert to_pixels(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
