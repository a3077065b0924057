import json
import re

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.data import read
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.data.names import in_order
from ctrl_diffusion.data.read import read_images

CLASSES = {"digit": {str(c): c for c in range(10)}, "ink": {str(y + 1): y for y in range(4)}}
SHAPE = (1, 8, 8)


def test_imagefolder_round_trip(tmp_path):
    data = labelled_digits("ink", 0)[0][0]
    write_imagefolder(tmp_path, data)
    assert (tmp_path / "metadata.csv").read_text().splitlines()[0] == "file_name,digit,ink"
    back = read_images(tmp_path, CLASSES, SHAPE)
    # a byte is 2/255 wide
    torch.testing.assert_close(back.x, data.x, rtol=0, atol=1 / 255 + 1e-6)
    assert back.values == data.values
    for name in CLASSES:
        assert torch.equal(back.labels[name], data.labels[name])
    # left out, the classes are those that occur, numbers in their order, and grey images stay grey
    inferred = read_images(tmp_path, {"ink": None})
    assert inferred.values == {"ink": ("1", "2", "3", "4")}
    assert torch.equal(inferred.labels["ink"], data.labels["ink"])
    assert torch.equal(inferred.x, back.x)


def write(folder, rows, size=(8, 8)):
    """A table of rows, and the images a.png, b.png … of their names."""
    for row in rows:
        if re.fullmatch(r"[a-z]\d*\.png", name := row.split(",")[0]):
            Image.fromarray(np.zeros(size, np.uint8)).save(folder / name)
    (folder / "metadata.csv").write_text("file_name,digit,ink\n" + "\n".join(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["a.png,3,5"], "row 1: ink must be one of 1, 2, 3, 4, got '5'"),
        (["a.png,3,1", "b.png,3,"], "row 2: ink is blank. Label it or remove the row."),
        (["a.png,3,1", "b.png,3"], "row 2: it has 2 fields, the header 3. Quote a field that has commas in it"),
        (["a.png,ten,1"], "row 1: digit must be one of"),
        (["a.png,3,1", "none.png,3,1"], "row 2: cannot read 'none.png'"),
        ([",3,1"], "row 1: cannot read its image .its path is blank"),
        (["folder,3,1"], "row 1: cannot read its image .'folder' is no file"),
        (["broken.png,3,1"], "row 1: cannot read 'broken.png'"),
        (["text.png,3,1"], "row 1: cannot read 'text.png'"),
        (["huge.png,3,1"], "row 1: cannot read 'huge.png' .9000×9000 pixels are too many"),
        (["../a.png,3,1"], "row 1: cannot read its image .'../a.png' lies outside the dataset's folder"),
        (["/etc/hostname,3,1"], "row 1: cannot read its image .'/etc/hostname' lies outside"),
        (["a.png,3,1", "b.png,3,2", "a.png,3,3"], "row 3: 'a.png' is in row 1 too"),
        (["a.png,3,1", "sub/../a.png,3,3"], "row 2: 'sub/../a.png' is in row 1 too"),
    ],
)
def test_bad_folders_are_named_row_by_row(tmp_path, rows, message):
    write(tmp_path, rows)
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)).save(whole)
    (tmp_path / "broken.png").write_bytes(whole.read_bytes()[:400])
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path, CLASSES, SHAPE)


def test_missing_table_and_column(tmp_path):
    with pytest.raises(ValueError, match=r"no metadata\.csv, metadata\.jsonl or metadata\.parquet"):
        read_images(tmp_path, CLASSES, SHAPE)
    write(tmp_path, ["a.png,3,1"])
    with pytest.raises(ValueError, match="no column slant; it has: file_name, digit, ink"):
        read_images(tmp_path, {"slant": None}, SHAPE)


def test_jsonl_is_read_as_csv_is(tmp_path):
    write(tmp_path, ["a.png,3,1", "b.png,4,2"])
    first = read_images(tmp_path, CLASSES, SHAPE)
    (tmp_path / "metadata.csv").unlink()
    rows = [{"file_name": "a.png", "digit": 3, "ink": "1"}, {"file_name": "b.png", "digit": 4, "ink": 2}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    second = read_images(tmp_path, CLASSES, SHAPE)
    for name in CLASSES:
        assert torch.equal(first.labels[name], second.labels[name])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"')
    with pytest.raises(ValueError, match="row 1: line 1 is no JSON object: the object is cut off"):
        read_images(tmp_path, CLASSES, SHAPE)


def test_images_of_another_size_are_resized_with_a_warning(tmp_path):
    write(tmp_path, ["a.png,3,1", "wide.png,3,2"])
    Image.fromarray(np.full((8, 9, 3), 255, np.uint8)).save(tmp_path / "wide.png")
    with pytest.warns(UserWarning, match=r"1 of 2 images are not 8×8 \(row 2 is 9×8\): they were resized"):
        data = read_images(tmp_path, CLASSES, SHAPE)
    assert data.x.shape == (2, *SHAPE)
    torch.testing.assert_close(data.x[1], torch.ones(SHAPE))


def test_numbers_of_many_values_are_a_scale(tmp_path):
    write(tmp_path, [f"a{i}.png,3,{i / 100}" for i in range(81)])
    data = read_images(tmp_path, {"ink": None}, SHAPE)
    # levels over the central 90 % of 0 … 0.8
    assert (len(data.values["ink"]), data.values["ink"][0], data.values["ink"][-1]) == (9, "0.04", "0.76")
    y = data.labels["ink"]
    torch.testing.assert_close(y, (torch.arange(81) / 100 - 0.04) / 0.72 * 8)
    assert float(data.space("ink").text_of(float(y[50]))) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="row 1: ink must be one of low, high, got '0.0'"):
        read_images(tmp_path, {"ink": {"low": 0, "high": 1}}, SHAPE)
    few = read_images(tmp_path, {"digit": None}, SHAPE)
    assert few.values["digit"] == ("3",)
    with pytest.raises(ValueError, match="digit is 3 nearly everywhere, no scale"):
        read_images(tmp_path, {"digit": None}, SHAPE, scales={"digit": True})
    write(tmp_path, [f"a{i}.png,3,v{i}" for i in range(81)])
    with pytest.raises(ValueError, match="ink has 81 different values, more than 64 classes"):
        read_images(tmp_path, {"ink": None}, SHAPE)
    with pytest.raises(ValueError, match="row 1: ink must be a number, got 'v0'"):
        read_images(tmp_path, {"ink": None}, SHAPE, scales={"ink": True})


def test_tags_are_controls_of_two_classes(tmp_path):
    """Of a column that lists any number of them, in a table or as a list."""
    texts = ["hat; glasses", "", "glasses", "hats|scarf", "scarf,hat"]
    write(tmp_path, [f'a{i}.png,3,"{text}"' for i, text in enumerate(texts)])
    lists = [re.split("[;,|] ?", text) if text else [] for text in texts]
    rows = [{"file_name": f"a{i}.png", "ink": tags} for i, tags in enumerate(lists)]
    (tmp_path / "lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    saved = [{"image": str(tmp_path / row["file_name"]), "ink": row["ink"]} for row in rows]
    Dataset.from_list(saved).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    mapping, tags = {"wears_hat": "ink", "scarf": "ink"}, {"wears_hat": "hat", "scarf": "scarf"}
    for source in (tmp_path, tmp_path / "lists.jsonl", tmp_path / "saved"):
        data = read_images(source, {"wears_hat": None, "scarf": None}, SHAPE, mapping, tags=tags)
        assert data.values == {"wears_hat": ("no", "yes"), "scarf": ("no", "yes")}
        assert data.labels["wears_hat"].tolist() == [1, 0, 0, 0, 1]
        assert data.labels["scarf"].tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="no row has the tag 'Hat' in ink; the most frequent are: glasses, hat, scarf"):
        read_images(tmp_path, {"hat": None}, SHAPE, {"hat": "ink"}, tags={"hat": "Hat"})


def test_rows_that_cannot_be_used_are_skipped_and_counted(tmp_path):
    good = ["c.png,5,2", "e.png,6,2", "f.png,6,3"]
    rows = ["a.png,3,1", "none.png,3,1", "b.png,4,", *good, "d.png,5,9", "a.png,1,1"]
    write(tmp_path, rows)
    with pytest.warns(UserWarning, match="rows cannot be used") as record:
        data = read_images(tmp_path, CLASSES, SHAPE, skip_bad=True)
    assert data.labels["digit"].tolist() == [3, 5, 6, 6]
    (message,) = [str(warning.message) for warning in record]
    counts = "1 × unreadable images, 1 × missing labels, 1 × unknown labels, 1 × repeated images"
    assert f"4 of 8 rows cannot be used ({counts}; the first: " in message
    assert "row 2: cannot read 'none.png'" in message
    write(tmp_path, [row for row in rows if row not in good[1:]])
    with pytest.raises(ValueError, match="4 of 6 rows cannot be used .* That is more than half"):
        read_images(tmp_path, CLASSES, SHAPE, skip_bad=True)


def test_images_as_cameras_and_scanners_leave_them(tmp_path):
    """Each file shows the left half black, the right half white; as grey and as colour."""
    grey = np.zeros((8, 8), np.uint8)
    grey[:, 4:] = 255
    half = torch.from_numpy(grey.astype(np.float32)) / 127.5 - 1
    upright = Image.fromarray(grey)
    turned = Image.fromarray(np.rot90(grey).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter to the right
    turned.save(tmp_path / "camera.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, :4, 3] = 255  # the right half is black and transparent
    Image.fromarray(clear).save(tmp_path / "clear.png")
    upright.convert("P").save(tmp_path / "palette.png")
    hidden = Image.fromarray(grey // 255).convert("P")
    hidden.putpalette([0, 0, 0, 0, 0, 0])
    hidden.save(tmp_path / "hidden.png", transparency=1)  # black on nothing
    upright.convert("RGB").convert("CMYK").save(tmp_path / "print.tiff")
    upright.convert("1").save(tmp_path / "bits.png")
    upright.convert("LA").save(tmp_path / "alpha.png")
    files = sorted(path.name for path in tmp_path.iterdir())
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,ink\n" + "\n".join(f"{name},{1 + i % 2}" for i, name in enumerate(files)))
    for channels in (1, 3):
        x = read_images(tmp_path, {"ink": None}, (channels, 8, 8)).x
        for name, image in zip(files, x, strict=True):
            torch.testing.assert_close(image, half.expand(channels, 8, 8), msg=name)
    x = read_images(tmp_path, {"ink": None}, (4, 8, 8)).x[files.index("clear.png")]
    assert x[3, 0].tolist() == [1.0] * 4 + [-1.0] * 4
    upright.convert("F").save(tmp_path / "float.tiff")
    table.write_text("file_name,ink\nfloat.tiff,1")
    with pytest.raises(ValueError, match=r"row 1: cannot read 'float.tiff' \(its pixels are floats"):
        read_images(tmp_path, {"ink": None}, SHAPE)


def test_a_million_pixels_are_brought_down_with_a_warning(tmp_path):
    write(tmp_path, ["a.png,3,1", "big.png,3,2"])
    Image.new("L", (1000, 1000), 255).save(tmp_path / "big.png")
    with pytest.warns(UserWarning, match=r"row 2 is 1000×1000\): they were resized"):
        data = read_images(tmp_path, CLASSES, SHAPE)
    torch.testing.assert_close(data.x[1], torch.ones(SHAPE))


def test_labels_are_ordered_as_numbers_if_they_are_numbers():
    assert in_order(["10", "9", "1", "9"]) == ("1", "9", "10")
    assert in_order(["10", "9", "low"]) == ("10", "9", "low")


WORDS = ("", "nan", "NaN", "NA", "N/A", "None", "null", "NULL", "?", "-")


def labelled_by(tmp_path, monkeypatch, source, labels):
    """A source of 20 images with these labels, and how its label is mapped."""
    write(tmp_path, [f"a{i}.png,3,1" for i in range(20)])
    names, table = [f"a{i}.png" for i in range(20)], tmp_path / f"t.{source}"
    if source == "csv":
        table.write_text("file_name,y\n" + "\n".join(map(",".join, zip(names, map(str, labels), strict=True))))
    elif source == "jsonl":
        rows = [{"file_name": name, "y": label} for name, label in zip(names, labels, strict=True)]
        table.write_text("\n".join(map(json.dumps, rows)))
    elif source == "parquet":
        Dataset.from_dict({"path": names, "y": list(labels)}).to_parquet(table)
    elif source == "saved":
        saved = [str(tmp_path / name) for name in names]
        Dataset.from_dict({"image": saved, "y": list(labels)}).cast_column("image", datasets.Image()).save_to_disk(
            table
        )
    else:
        remaining = iter(labels)
        monkeypatch.setattr(read, "load_rule", lambda _: lambda image: next(remaining))
        return tmp_path, {"y": "my:rule"}
    return table, {}


SOURCES = ("csv", "jsonl", "parquet", "saved", "rule")
TYPED = (None, float("nan"))
CLASSES_OF_20 = ["light", "heavy"] * 10


@pytest.mark.parametrize("word", [*WORDS, *TYPED], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_a_missing_label_is_the_same_in_every_source(tmp_path, monkeypatch, source, word):
    if word is None or isinstance(word, float):
        if source == "csv":
            word = "NaN"  # which has no types
        labels = [*(float(i % 2) for i in range(4)), word, *(float(i % 2) for i in range(15))]
    else:
        labels = [*CLASSES_OF_20[:4], word, *CLASSES_OF_20[5:]]
    path, mapping = labelled_by(tmp_path, monkeypatch, source, labels)
    with pytest.raises(ValueError, match=r"row 5: y is (blank|missing)") as refused:
        read_images(path, {"y": None}, SHAPE, mapping)
    assert "\n" not in str(refused.value)
    path, mapping = labelled_by(tmp_path, monkeypatch, source, labels)
    with pytest.warns(UserWarning, match=r"1 of 20 rows cannot be used \(1 × missing labels; the first: .* row 5"):
        data = read_images(path, {"y": None}, SHAPE, mapping, skip_bad=True)
    assert len(data.values["y"]) == 2
    assert len(data) == 19


@pytest.mark.parametrize("word", WORDS[1:])
@pytest.mark.parametrize("source", SOURCES)
def test_a_word_that_is_meant_is_a_class(tmp_path, monkeypatch, source, word):
    """If it is kept, or p̂ or the prior knows a class of this name."""
    labels = [word, "heavy"] * 10
    path, mapping = labelled_by(tmp_path, monkeypatch, source, labels)
    data = read_images(path, {"y": None}, SHAPE, mapping, keep_missing=True)
    assert set(data.values["y"]) == {word, "heavy"}
    path, mapping = labelled_by(tmp_path, monkeypatch, source, labels)
    data = read_images(path, {"y": {word: 0, "heavy": 1}}, SHAPE, mapping)
    assert data.labels["y"].tolist() == [0, 1] * 10


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("word", ["NaN", "?", "1,5", "3_7", "4 cm"])
def test_one_word_among_numbers_does_not_turn_a_scale_into_classes(tmp_path, word, keep):
    rows = [f"a{i}.png,3,{i / 100}" for i in range(90)]
    rows[6] = f'a6.png,3,"{word}"'
    write(tmp_path, rows)
    bad = word in ("NaN", "?") and not keep
    message = rf"row 7: ink is missing \('{re.escape(word)}'\)" if bad else f"no scale: row 7 has '{word}'"
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path, {"ink": None}, SHAPE, keep_missing=keep)
    with pytest.warns(UserWarning, match="1 of 90 rows cannot be used"):
        data = read_images(tmp_path, {"ink": None}, SHAPE, scales=None if bad else {"ink": True}, skip_bad=True)
    assert data.space("ink").scale
    assert len(data) == 89


def test_spellings_of_one_class_are_one_class_whatever_is_known(tmp_path):
    spellings = ["1", "1.0", "01", " 1 ", "2", "2.00", "+2", "2"]
    write(tmp_path, [f"a{i}.png,3,{text}" for i, text in enumerate(spellings)])
    for columns, values in (({"ink": None}, ("1", "2")), ({"ink": {"1.": 0, "2e0": 1}}, ("1.", "2e0"))):
        data = read_images(tmp_path, columns, SHAPE)
        assert data.values["ink"] == values
        assert data.labels["ink"].tolist() == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match="row 5: ink must be one of 1, 3, got '2'"):
        read_images(tmp_path, {"ink": {"1": 0, "3": 1}}, SHAPE)


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.int64(3), np.bool_(True), np.str_("a"), torch.tensor(2), torch.tensor([0.25]), True]
)
def test_rules_may_return_scalars_of_numpy_and_torch(tmp_path, monkeypatch, number):
    path, mapping = labelled_by(tmp_path, monkeypatch, "rule", [number, "other"] * 10)
    data = read_images(path, {"y": None}, SHAPE, mapping)
    assert str(number.item() if hasattr(number, "item") else number) in data.values["y"]


@pytest.mark.parametrize(
    "label", [np.zeros(2), {"a": 1}, b"a", object(), [[1]]], ids=lambda label: type(label).__name__
)
def test_rules_must_not_return_anything_else(tmp_path, monkeypatch, label):
    path, mapping = labelled_by(tmp_path, monkeypatch, "rule", ["a", label, *["b"] * 18])
    with pytest.raises(ValueError, match="row 2: the rule must return a text or a number, got ") as refused:
        read_images(path, {"y": None}, SHAPE, mapping)
    assert "\n" not in str(refused.value)


def test_what_was_read_is_one_line_of_bounded_length(tmp_path):
    letters = "abcdefghijkl"
    rows = [f"a{i}.png,{letters[i % 12]},{i / 100}" for i in range(96)]
    rows[5] = "a5.png,?,0.05"
    write(tmp_path, rows)
    with pytest.warns(UserWarning, match="1 of 96 rows"):
        data = read_images(tmp_path, {"digit": None, "ink": None}, SHAPE, skip_bad=True)
    counts = ", ".join(f"{7 if letter == 'f' else 8} × {letter}" for letter in letters[:10])
    assert data.about == (
        f"{tmp_path / 'metadata.csv'}: 95 of 96 rows (1 × missing labels left out); images in the column file_name; "
        f"digit: {counts} and 2 more; ink: a scale, 0.054 … 0.903."
    )  # 5 % of 94 steps are 4.7, from 0.04 towards 0.06


def test_a_missing_entry_has_no_tags(tmp_path):
    write(tmp_path, [f'a{i}.png,3,"{text}"' for i, text in enumerate(["hat; scarf", "", "NaN", "hat"])])
    data = read_images(tmp_path, {"hat": None}, SHAPE, {"hat": "ink"}, tags={"hat": "hat"})
    assert data.labels["hat"].tolist() == [1, 0, 0, 1]
