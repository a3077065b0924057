"""Datasets with something wrong in them, as train and classifier meet them."""

import shutil

import pytest
import yaml
from PIL import Image
from tiny import TINY, labels_changed

from ctrl_diffusion.run import prepare

# what is wrong with a copy of 500 digits: a line of its table for the line of row 5, or what is done to the folder, and
# what is said of it
BROKEN = {
    "missing file": ("lost.png,3,1", "row 5: cannot read 'lost.png'"),
    "truncated PNG": ("truncated.png,3,1", "row 5: cannot read 'truncated.png' (image file is truncated"),
    "blank label": ("00004.png,3,", "row 5: ink is blank. Label it or remove the row."),
    "file in two rows": ("00001.png,3,1", "row 5: '00001.png' is in row 2 too and might stand in two parts"),
    "path traversal": ("../../secret.png,3,1", "row 5: cannot read its image ('../../secret.png' lies outside the"),
    "too large": ("huge.png,3,1", "row 5: cannot read 'huge.png' (9000×9000 pixels are too many). Mend it or"),
    "lone class": ("00004.png,3,5", "ink = '5' has 1 example(s). Bring at least 10 of every class, or leave the"),
    "not UTF-8": (lambda t: t.write_bytes(t.read_bytes() + "x.png,3,zwölf".encode("latin-1")), "is not UTF-8: 'utf-8'"),
    "no such column": (
        lambda t: t.write_text(t.read_text().replace("ink", "stroke", 1)),
        "has no column ink; it has: file_name, digit, stroke.",
    ),
    "no table": (lambda t: t.unlink(), "has no metadata.csv, metadata.jsonl or metadata.parquet. Write one with"),
    "unquoted comma": ("00004.png,3,1, dark", "row 5: it has 4 fields, the header 3. Quote a field that has commas"),
    "field left out": ("00004.png,3", "row 5: it has 2 fields, the header 3."),
    "missing label": ("00005.png,3,N/A", "row 5: ink is missing ('N/A'). Label it, remove the row, or, if the word is"),
    "missing class": ("00004.png,NaN,1", "row 5: digit is missing ('NaN'). Label it"),
    "broken EXIF": ("exif.jpg,3,1", "row 5: cannot read 'exif.jpg' (error: required argument is not an integer). Mend"),
    "quote never closed": ('00004.png,3,"1', "row 5 (line 6) cannot be read: unexpected end of data. Is a quote in it"),
    "doubled header": (
        lambda t: t.write_text(t.read_text().replace("digit", " ink ", 1)),
        "ink is the name of columns 2 and 3. Rename or remove one.",
    ),
    "nameless column": (
        lambda t: t.write_text(t.read_text().replace("digit", "", 1)),
        "metadata.csv: column 2 has no name. Name it, or remove the column.",
    ),
    "JSON array": (
        lambda t: t.rename(t.with_suffix(".jsonl")).write_text('[{"file_name": "00001.png", "digit": 3, "ink": 1}]'),
        "row 1: line 1 is no JSON object: it belongs to a JSON array. Write one object a line, with neither",
    ),
}  # fmt: skip


SKIPPED = (
    "missing file", "truncated PNG", "blank label", "file in two rows", "path traversal", "too large", "unquoted comma",
    "missing label", "broken EXIF",
)  # fmt: skip
# a good orientation, and an artist of a kind that cannot hold the bytes: writing it anew is a struct.error in Pillow
EXIF = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x1c\x01\x02\0\x03\0\0\0"
EXIF += b"\xff" * 4 + b"\0" * 4


JOBS = {
    "train": ["train", "--prior", "digits", "--control", "ink", "--condition", "digit", "--data"],
    "classifier": ["classifier", "--control", "ink", "--condition", "digit"],
}


@pytest.fixture(scope="module")
def ragged(quick_run, tmp_path_factory):
    """A dataset with bad files lying in it, none of them in its table yet."""
    folder = tmp_path_factory.mktemp("ragged") / "data"
    shutil.copytree(quick_run / "data", folder)
    (folder / "truncated.png").write_bytes((folder / "00004.png").read_bytes()[:-30])
    Image.new("1", (9000, 9000)).save(folder / "huge.png")
    Image.new("L", (1250, 800)).save(folder / "million.png")
    Image.new("L", (9, 8)).save(folder / "wide.png")
    Image.new("L", (8, 8)).save(folder / "exif.jpg", exif=EXIF)
    return folder


def with_rows(source, folder, rows):
    """A copy of a dataset in which these lines take the places of those of row 5 and the following."""
    labels_changed(source, folder, lambda i, line: rows[i - 4] if 4 <= i < 4 + len(rows) else line)
    return folder


@pytest.mark.parametrize("command", JOBS)
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_dataset_is_one_line_that_names_the_row(ctrl_here, ragged, tmp_path, what, command):
    wrong, message = BROKEN[what]
    data = with_rows(ragged, tmp_path / "data", [wrong] if isinstance(wrong, str) else [])
    if callable(wrong):
        wrong(data / "metadata.csv")
    done = ctrl_here(*JOBS[command], data, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("ctrl: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:log Z")
@pytest.mark.parametrize("command", JOBS)
def test_bad_rows_are_skipped_and_odd_sizes_resized(ctrl_here, ragged, tmp_path, command):
    """Every kind of bad row at once, a million pixels and a wide image: two lines, and the job is done."""
    rows = [BROKEN[what][0] for what in SKIPPED]
    data = with_rows(ragged, tmp_path / "data", [*rows, "million.png,3,1", "wide.png,3,1"])
    settings = tmp_path / "tiny.yaml"
    settings.write_text(yaml.safe_dump(TINY))
    prior = ["--prior", "digits"] if command == "classifier" else []
    done = ctrl_here(
        *JOBS[command], data, *prior, "--skip-bad", "--config", settings, "--quiet", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "metadata.csv" in line]
    assert "9 of 500 rows cannot be used" in said[0]
    counts = "5 × unreadable images, 2 × missing labels, 1 × repeated images, 1 × rows of another length"
    assert counts in said[0]
    assert "2 of 500 images are not 8×8 (row 14 is 1250×800): they were resized." in said[1]
    assert len(said) == 2, "quiet"
    assert (tmp_path / "out" / "report.html").is_file()


def test_copies_under_other_names_are_told(ctrl_here, quick_run, tmp_path):
    """In one dataset, and between the data of p̂ and of its judge."""
    for name in ("data", "judge_data"):
        shutil.copytree(quick_run / name, tmp_path / name)
    shutil.copy(tmp_path / "data" / "00001.png", tmp_path / "data" / "00004.png")
    shutil.copy(tmp_path / "data" / "00002.png", tmp_path / "judge_data" / "00000.png")
    given = {"prior": "digits", "control": "ink", "data": str(tmp_path / "data"), "condition": "digit"}
    with (
        pytest.warns(UserWarning, match=r"1 of 500 images are copies of another \(the first: rows 2 and 5 of those"),
        pytest.warns(UserWarning, match="1 of its images are in judge_data too"),
    ):
        prepare.prepare(given | {"judge_data": str(tmp_path / "judge_data")})


def imagefolder(source, folder, **columns):
    """A copy of 500 digits whose table has the columns called otherwise."""
    shutil.copytree(source, folder)
    header, rest = (folder / "metadata.csv").read_text().split("\n", 1)
    for old, new in columns.items():
        header = header.replace(old, new)
    (folder / "metadata.csv").write_text(f"{header}\n{rest}")
    return folder


def test_what_was_understood_is_one_line_unless_quiet(ctrl_here, quick_run, tmp_path):
    """Of the images' column, that of y, and the classes with their counts; before anything is fitted."""
    data = imagefolder(quick_run / "data", tmp_path / "photos", file_name="scan", ink="tone")
    settings = tmp_path / "tiny.yaml"
    settings.write_text(yaml.safe_dump(TINY))
    job = ["classifier", data, "--control", "ink:tone", "--config", settings, "--out", tmp_path / "out"]
    done = ctrl_here(*job)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "metadata.csv" in line]
    assert line.startswith(f"ctrl: {data / 'metadata.csv'}: 500 of 500 rows; images in the column scan; ink: ")
    assert [part.split(" × ")[1] for part in line.rstrip(".").split("ink: ")[1].split(", ")] == ["1", "2", "3", "4"]
    assert not [line for line in ctrl_here(*job, "--overwrite", "--quiet").stderr.splitlines() if "rows" in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            (),
            "row 5: ink is missing ('none'). Label it, remove the row, or, if the word is a class, pass --missing ",
        ),
        (("--missing", "keep"), "ink = 'none' has 1 example(s). Bring at least 10 of every class"),
        (("-o", "missing=keep"), "ink = 'none' has 1 example(s)"),
        (("--missing", "drop"), "missing: Input should be 'bad' or 'keep', got 'drop'"),
        (("--image", "ink"), "row 1: cannot read '"),
        (("--image", "scan"), "has no column scan for the images; it has: file_name, digit, ink."),
        (("-o", "image=scan"), "has no column scan for the images"),
    ],
)
@pytest.mark.parametrize("command", JOBS)
def test_a_word_may_be_a_class_and_a_column_be_named(ctrl_here, ragged, tmp_path, command, options, message):
    data = with_rows(ragged, tmp_path / "data", ["00004.png,3,none"])
    done = ctrl_here(*JOBS[command], data, *options, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
