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
    "no table": (lambda t: t.unlink(), "has no metadata.csv or metadata.jsonl. Write one with file_name"),
}  # fmt: skip


SKIPPED = ("missing file", "truncated PNG", "blank label", "file in two rows", "path traversal", "too large")


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
    assert "6 of 500 rows cannot be used" in said[0]
    assert "4 × unreadable images, 1 × blank labels, 1 × repeated images" in said[0]
    assert "2 of 500 images are not 8×8 (row 11 is 1250×800): they were resized." in said[1]
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
