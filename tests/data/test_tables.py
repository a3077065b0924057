"""Every kind of table gives the same labelled images."""

import io
import json

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ctrl_diffusion.data.read import read_images
from ctrl_diffusion.data.sources import open_table

N = 12
SHAPE = (1, 8, 8)


def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)) for _ in range(N)]


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


LABELS = [f"0{i % 3}" for i in range(N)]  # as it is written, not 1


def files(folder):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images()):
        image.save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(N)]


def folder_csv(root):
    lines = [f"{name},{y}" for name, y in zip(files(root), LABELS, strict=True)]
    (root / "metadata.csv").write_text("file_name,ink\n" + "\n".join(lines), encoding="utf-8-sig")
    return root


def folder_jsonl(root):
    rows = [{"file_name": name, "ink": y} for name, y in zip(files(root), LABELS, strict=True)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def csv_file(root):
    lines = [f"pictures/{name},{y}" for name, y in zip(files(root / "pictures"), LABELS, strict=True)]
    (root / "labels.csv").write_text("image,ink\n" + "\n".join(lines))
    return root / "labels.csv"


def parquet_paths(root):
    datasets.Dataset.from_dict({"path": files(root), "ink": LABELS}).to_parquet(root / "t.parquet")
    return root / "t.parquet"


def parquet_bytes(root):
    datasets.Dataset.from_dict({"image": [encoded(i) for i in images()], "ink": LABELS}).to_parquet(root / "t.parquet")
    return root / "t.parquet"


def with_features():
    features = datasets.Features({"image": datasets.Image(), "ink": datasets.ClassLabel(names=["00", "01", "02"])})
    rows = {"image": images(), "ink": [i % 3 for i in range(N)]}
    return datasets.Dataset.from_dict(rows, features=features)


def parquet_images(root):
    with_features().to_parquet(root / "t.parquet")
    return root / "t.parquet"


def saved(root):
    with_features().save_to_disk(root / "saved")
    return root / "saved"


def saved_splits(root):
    other = with_features().select(range(3))
    datasets.DatasetDict({"test": other, "train": with_features()}).save_to_disk(root / "saved")
    return root / "saved"


def saved_with_format(root):
    with_features().with_format("torch").save_to_disk(root / "saved")
    return root / "saved"


def semicolons(root):
    lines = [f"{name};{y}" for name, y in zip(files(root), LABELS, strict=True)]
    (root / "t.csv").write_text("\r\n".join([" file_name ; ink ", *lines, ""]))
    return root / "t.csv"


def folder_parquet(root):
    datasets.Dataset.from_dict({"file_name": files(root), "ink": LABELS}).to_parquet(root / "metadata.parquet")
    return root


def shards(root):
    (root / "data").mkdir()
    for i in range(2):
        part = with_features().shard(2, i, contiguous=True)
        part.to_parquet(root / "data" / f"train-0000{i}-of-00002.parquet")
    with_features().select(range(3)).to_parquet(root / "data" / "test-00000-of-00001.parquet")
    return root


def numbered_files(root):
    for i in range(3):
        with_features().shard(3, i, contiguous=True).to_parquet(root / f"{i:04}.parquet")
    return root


def subfolders(root, split="."):
    for i, (image, y) in enumerate(zip(images(), LABELS, strict=True)):
        folder = root / split / y / ("deeper" if i % 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.PNG")
    return root


def split_of_subfolders(root):
    Image.new("L", (8, 8)).save(subfolders(root, "train") / "train" / ".hidden.png")
    (root / "val" / "00").mkdir(parents=True)
    Image.new("L", (8, 8)).save(root / "val" / "00" / "other.png")
    return root


def split_with_table(root):
    (root / "validation").mkdir()
    (root / "train").mkdir()
    folder_csv(root / "train")
    return root


def other_column(name):
    def table(root):
        lines = [f"{y},{file}" for file, y in zip(files(root), LABELS, strict=True)]
        (root / "t.csv").write_text(f"ink,{name}\n" + "\n".join(lines))
        return root / "t.csv"

    table.__name__ = f"column_{name}"
    return table


def typed_column(root):
    """Beside columns that have the names of images' columns."""
    rows = with_features().rename_column("image", "scan").add_column("path", ["lost.png"] * N)
    rows.add_column("img", ["lost.png"] * N).to_parquet(root / "t.parquet")
    return root / "t.parquet"


KINDS = (
    folder_csv, folder_jsonl, csv_file, parquet_paths, parquet_bytes, parquet_images, saved, saved_splits,
    saved_with_format, semicolons, folder_parquet, shards, numbered_files, subfolders, split_of_subfolders,
    split_with_table, typed_column, *map(other_column, ("img", "jpg", "Filename", "scan")),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_table_gives_the_same(kind, tmp_path, capfd):
    """The same images with the same labels, in the order of the table; of sub-folders in that of their names."""
    source = kind(tmp_path)
    capfd.readouterr()
    data = read_images(source, {"ink": None}, SHAPE)
    expected = torch.stack([torch.from_numpy(np.asarray(i).astype(np.float32)) for i in images()])[:, None] / 127.5 - 1
    labels = torch.arange(N) % 3
    if "subfolders" in kind.__name__:
        order = sorted(range(N), key=lambda i: (LABELS[i], i % 2, str(i)))  # what is deeper comes after
        expected, labels = expected[order], labels[order]
    assert torch.equal(data.x, expected)
    assert data.values["ink"] == ("00", "01", "02")
    assert torch.equal(data.labels["ink"], labels)
    assert data.about.endswith("; ink: 4 × 00, 4 × 01, 4 × 02.")
    assert "\n" not in data.about
    assert capfd.readouterr() == ("", ""), "no bars or logs of a dependency"


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (saved_splits, "train of the splits test, train;"),
        (
            shards,
            "data (2 Parquet files): 12 of 12 rows; train-00000-of-00002.parquet and the like, not test-00000-of-",
        ),
        (
            split_of_subfolders,
            "train: 12 of 12 rows; train/ of the splits train, val; labels are the names of the sub-fo",
        ),
        (split_with_table, "train/metadata.csv: 12 of 12 rows; train/ of the splits train, validation; images in the"),
        (subfolders, "labels are the names of the sub-folders; ink was taken from label;"),
        (other_column("img"), "images in the column img;"),
        (typed_column, "images in the column scan;"),
    ],
)
def test_the_reading_that_was_taken_is_told(kind, note, tmp_path):
    source = kind(tmp_path)
    assert note in read_images(source, {"ink": None}, SHAPE).about


def test_metadata_of_two_formats_and_files_beside_the_classes_are_told(tmp_path):
    (tmp_path / "both").mkdir()
    folder_jsonl(folder_csv(tmp_path / "both"))
    assert "metadata.csv was taken, not metadata.jsonl;" in read_images(tmp_path / "both", {"ink": None}, SHAPE).about
    folder = subfolders(tmp_path / "classes")
    (folder / "00" / "notes.txt").write_text("hello")
    Image.new("L", (8, 8)).save(folder / "grid.png")
    about = read_images(folder, {"ink": None}, SHAPE).about
    assert "1 of their files are no images by their names (the first: 00/notes.txt);" in about
    assert "1 files beside the sub-folders are not read;" in about


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    """Among others that are none."""
    (subfolders(tmp_path) / "00").rename(tmp_path / "train")
    assert read_images(tmp_path, {"ink": None}, SHAPE).values["ink"] == ("01", "02", "train")


@pytest.mark.parametrize(
    ("columns", "mapping", "message"),
    [
        ({"ink": None, "digit": None}, None, "has no column digit, ink; it has: file_name, label."),
        ({"ink": None}, {"ink": "stroke"}, "has no column stroke; it has: file_name, label."),
        ({"ink": None, "c": None}, {"c": "label"}, "has no column ink; it has: file_name, label."),
    ],
)
def test_subfolders_name_one_label(tmp_path, columns, mapping, message):
    with pytest.raises(ValueError, match=message):
        read_images(subfolders(tmp_path), columns, SHAPE, mapping)
    assert read_images(tmp_path, {"ink": None}, SHAPE, {"ink": "label"}).values["ink"] == ("00", "01", "02")


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """The code path is the real one; what would be downloaded is a saved folder."""
    calls = []

    def download(name, split):
        calls.append((name, split))
        return datasets.load_from_disk(str(saved(tmp_path)))

    monkeypatch.setattr(datasets, "load_dataset", download)
    data = read_images("someone/digits-with-ink", {"ink": None}, SHAPE)
    assert calls == [("someone/digits-with-ink", "train")]
    assert len(data) == N


def test_a_name_on_the_hub_that_cannot_be_reached():
    with pytest.raises(ValueError, match="someone/nothing is no folder or file here, and cannot be read: ") as error:
        read_images("someone/nothing", {"ink": None}, SHAPE)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_table_is_reported(tmp_path):
    (tmp_path / "latin.csv").write_bytes("image,ink\na.png,schwärzer\n".encode("latin-1"))
    datasets.Dataset.from_dict({"drawing": ["a.png"], "ink": ["1"]}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "words.txt").write_text("hello")
    rows = with_features()
    datasets.DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "splits")
    for source, message in (
        ("latin.csv", "latin.csv is not UTF-8: .* Save it as UTF-8"),
        (
            "t.parquet",
            "no column file_name or image or path for the images; it has: drawing, ink. Name theirs with -",
        ),
        ("broken.parquet", "broken.parquet cannot be read"),
        ("words.txt", "is no table: \\.csv, \\.tsv, \\.jsonl, \\.parquet are read, and folders"),
        ("splits", "has the splits a, b and none called train"),
        ("nowhere/at/all", "there is no folder or file"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_table(tmp_path / source)
        assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_folder_is_reported(tmp_path):
    """One line, before any image is opened."""
    rows = with_features()
    for name in ("lost", "columns", "broken", "tests", "none", "flat", "named", "splits/val", "splits/test"):
        (tmp_path / name).mkdir(parents=True)
    rows.to_parquet(tmp_path / "lost" / "train-00001-of-00002.parquet")
    for name in ("columns", "broken"):
        rows.to_parquet(tmp_path / name / "0.parquet")
    rows.rename_column("ink", "stroke").to_parquet(tmp_path / "columns" / "1.parquet")
    (tmp_path / "broken" / "1.parquet").write_bytes(b"PAR1 and nothing else")
    for name in ("test-0", "validation-0"):
        rows.to_parquet(tmp_path / "tests" / f"{name}.parquet")
    files(tmp_path / "flat")
    files(tmp_path / "named")
    (tmp_path / "named" / "labels.csv").write_text("file_name,ink\n0.png,1")
    for source, message in (
        ("lost", "lost lacks number 0 of the 2 files of train. Bring it."),
        ("columns", "1.parquet has the columns image, stroke, 0.parquet image, ink."),
        ("broken", "broken/1.parquet cannot be read: "),
        ("tests", "has Parquet files of several splits and none called train. Name one file."),
        ("none", "has no metadata.csv, metadata.jsonl or metadata.parquet. Write one with file_name"),
        ("flat", "or put the images into a sub-folder for each class."),
        ("named", "It has labels.csv: name the file itself, if that is the table."),
        ("splits", "has the splits test, val and none called train. Name the one to be used."),
        ("moved/away/from", "If the data were moved, say where to: --data, or data: (judge_data: of a judge) in the"),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            open_table(tmp_path / source)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_column_of_images_that_does_not_stand_out_is_asked_for(tmp_path):
    features = datasets.Features({"mask": datasets.Image(), "pic": datasets.Image(), "ink": datasets.Value("string")})
    rows = {"mask": images(), "pic": images(), "ink": LABELS}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "typed.parquet")
    names = files(tmp_path)
    lines = [f"{name},{name},{y}" for name, y in zip(names, LABELS, strict=True)]
    (tmp_path / "named.csv").write_text("img,png,ink\n" + "\n".join(lines))
    for source, columns in (("typed.parquet", ("mask", "pic")), ("named.csv", ("img", "png"))):
        message = f"has several columns that may have the images: {', '.join(columns)}. Name theirs with --image COLUMN"
        with pytest.raises(ValueError, match=message):
            open_table(tmp_path / source)
        for column in columns:
            data = read_images(tmp_path / source, {"ink": None}, SHAPE, image=column)
            assert f"images in the column {column};" in data.about
        with pytest.raises(ValueError, match="has no column scan for the images; it has: "):
            open_table(tmp_path / source, "scan")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([i % 2 if i != 4 else -1 for i in range(N)], "row 5: ink is blank."),
        ([i % 2 if i != 4 else None for i in range(N)], "row 5: ink is blank."),
        ([i % 2 if i != 4 else 7 for i in range(N)], "row 5: ink: 7 is none of its 3 classes."),
    ],
)
def test_a_number_that_is_no_class_of_a_class_label_is_the_rows_fault(tmp_path, values, message):
    rows = with_features()
    table = rows.data.table.set_column(1, "ink", pyarrow.array(values, pyarrow.int64()))
    datasets.Dataset(table, info=rows.info).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path / "saved", {"ink": None}, SHAPE)
    with pytest.warns(UserWarning, match="1 of 12 rows cannot be used"):
        assert len(read_images(tmp_path / "saved", {"ink": None}, SHAPE, skip_bad=True)) == N - 1


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[:-40], lambda content: b"\xff" + content]
)
def test_a_damaged_saved_dataset_is_one_line(tmp_path, file, damage):
    path = saved(tmp_path) / file
    content = damage(path.read_bytes())
    path.unlink()  # which is mapped into memory where it was written
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/saved") as error:
        read_images(tmp_path / "saved", {"ink": None}, SHAPE)
    assert "\n" not in str(error.value)


def test_a_text_that_is_none_is_a_fault_of_its_table(tmp_path):
    """In Parquet no text need be UTF-8."""
    table = pyarrow.table(
        {"image": [encoded(i) for i in images()], "ink": pyarrow.array([b"\xff"] * N).cast("string", safe=False)}
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="t.parquet cannot be read: 'utf-8' codec can't decode byte") as error:
        read_images(tmp_path / "t.parquet", {"ink": None}, SHAPE)
    assert "\n" not in str(error.value)


def test_a_table_keeps_its_images_inside(tmp_path):
    datasets.Dataset.from_dict({"path": ["../a.png"], "ink": ["1"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"'\.\./a\.png' lies outside the dataset's folder"):
        open_table(tmp_path / "t.parquet").image(0)
