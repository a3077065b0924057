"""Every kind of table gives the same labelled images."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

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


LABELS = [f"0{i % 3}" for i in range(N)]  # "01" is not 1


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


KINDS = (
    folder_csv, folder_jsonl, csv_file, parquet_paths, parquet_bytes, parquet_images, saved, saved_splits
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_table_gives_the_same(kind, tmp_path, capfd):
    source = kind(tmp_path)
    capfd.readouterr()
    data = read_images(source, {"ink": None}, SHAPE)
    expected = torch.stack([torch.from_numpy(np.asarray(i).astype(np.float32)) for i in images()]) / 127.5 - 1
    assert torch.equal(data.x, expected[:, None])
    assert data.values["ink"] == ("00", "01", "02")
    assert data.labels["ink"].tolist() == [i % 3 for i in range(N)]
    assert capfd.readouterr() == ("", ""), "no bars of a dependency"


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
        ("t.parquet", "no column file_name or image or path for the images; it has: drawing, ink. Name theirs with --image"),
        ("broken.parquet", "broken.parquet cannot be read"),
        ("words.txt", "is no table: \\.csv, \\.tsv, \\.jsonl, \\.parquet are read, and folders"),
        ("splits", "has the splits a, b and none called train"),
        ("nowhere/at/all", "there is no folder or file"),
        ("", "has no metadata.csv"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_table(tmp_path / source)
        assert "\n" not in str(error.value)


def test_a_table_keeps_its_images_inside(tmp_path):
    datasets.Dataset.from_dict({"path": ["../a.png"], "ink": ["1"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"'\.\./a\.png' lies outside the dataset's folder"):
        open_table(tmp_path / "t.parquet").image(0)
