"""What is wrong with a table is one line that names its file and the row; what is only unusual is read."""

import json

import numpy as np
import pytest
from PIL import Image

from ctrl_diffusion.data.read import read_images

N, SHAPE = 8, (1, 8, 8)
INK = ["light", "heavy"] * 4
ROWS = [f"{i}.png,{ink}" for i, ink in enumerate(INK)]
CAPTIONED = [f"{i}.png,a sheet,{ink}" for i, ink in enumerate(INK)]
OBJECTS = [{"file_name": f"{i}.png", "ink": ink} for i, ink in enumerate(INK)]
LINES = [json.dumps(row) for row in OBJECTS]


@pytest.fixture
def read(tmp_path):
    """Write a table beside eight images and read it; a list is its lines."""
    for i in range(N):
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(tmp_path / f"{i}.png")

    def call(name, content, **options):
        content = "\n".join(content) if isinstance(content, list) else content
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return read_images(tmp_path / name, {"ink": None}, SHAPE, **options)

    return call


def changed(lines, row, text):
    """The lines with that of a row, from 1, changed."""
    return [*lines[: row - 1], text, *lines[row:]]


UNUSUAL = {
    "plain": ("t.csv", ["file_name,ink", *ROWS]),
    "byte-order mark": ("t.csv", b"\xef\xbb\xbf" + "\n".join(["file_name,ink", *ROWS]).encode()),
    "CRLF": ("t.csv", "\r\n".join(["file_name,ink", *ROWS, "", ""])),
    "CR": ("t.csv", "\r".join(["file_name,ink", *ROWS])),
    "blank lines": ("t.csv", ["", "file_name,ink", "", *ROWS, "", "  "]),
    "below a table": ("t.csv", ["file_name,ink", *ROWS, ",", ","]),
    "untrimmed": ("t.csv", [" file_name , ink ", *(row.replace(",", " ,  ") for row in ROWS)]),
    "quoted": ("t.csv", ['"file_name", "ink"', *(f'"{i}.png", "{ink}"' for i, ink in enumerate(INK))]),
    "semicolons": ("t.csv", [line.replace(",", ";") for line in ["file_name,ink", *ROWS]]),
    "tabs": ("t.tsv", [line.replace(",", "\t") for line in ["file_name,ink", *ROWS]]),
    "capital suffix": ("t.CSV", ["file_name,ink", *ROWS]),
    "caption with a comma": ("t.csv", ["file_name,text,ink", *changed(CAPTIONED, 3, '2.png,"wet, dark",light')]),
    "doubled quote": ("t.csv", ["file_name,text,ink", *changed(CAPTIONED, 3, '2.png,"a ""b"" c",light')]),
    "inches": ("t.csv", ["file_name,text,ink", *changed(CAPTIONED, 3, '2.png,12" wide,light')]),
    "objects": ("t.jsonl", LINES),
    "objects and blank lines": ("t.jsonl", "\n\n".join(LINES) + "\n \n"),
    "columns of some rows": ("t.jsonl", ['{"ink": "light", "file_name": "0.png", "seen": 1}', *LINES[1:]]),
    "columns of later rows": ("t.jsonl", [*LINES[:-1], '{"n": 1, "file_name": "7.png", "ink": "heavy"}']),
    "objects not asked for": ("t.jsonl", [json.dumps({**row, "box": {"at": [1, 2]}}) for row in OBJECTS]),
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_unusual_is_read_all_the_same(read, what):
    data = read(*UNUSUAL[what])
    assert data.values["ink"] == ("heavy", "light")
    assert data.labels["ink"].tolist() == [1, 0] * 4
    # pixels of a byte
    assert ((data.x[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [30 * i for i in range(N)]


def test_a_column_that_only_later_rows_have_is_a_column(read):
    """Not of the first row alone: whoever lacks it has no label."""
    lines = ['{"file_name": "0.png"}', *LINES[1:]]
    with pytest.raises(ValueError, match=r"t\.jsonl row 1: ink is blank"):
        read("t.jsonl", lines)
    with pytest.warns(UserWarning, match="1 × missing labels"):
        assert len(read("t.jsonl", lines, skip_bad=True)) == 7


# what is wrong, what is said of it, and whether the row alone can be left out
WRONG = {
    "unquoted comma": (
        "t.csv",
        ["file_name,text,ink", *changed(CAPTIONED, 3, "2.png,wet, dark,light")],
        "row 3: it has 4 fields, the header 3. Quote a field that has commas in it.",
        True,
    ),
    "all commas": (
        "t.csv",
        ["file_name,text,ink", *(f"{i}.png,wet, dark,{y}" for i, y in enumerate(INK))],
        "row 1: it has 4 fields, the header 3. Quote a field",
        False,
    ),
    "unquoted semicolon": (
        "t.csv",
        ["file_name;ink", *changed([r.replace(",", ";") for r in ROWS], 2, "1.png;a;b")],
        "row 2: it has 3 fields, the header 2. Quote a field that has semicolons in it.",
        True,
    ),
    "too few": ("t.csv", ["file_name,ink", *changed(ROWS, 8, "7.png")], "row 8: it has 1 fields, the header 2.", True),
    "after blank lines": (
        "t.csv",
        ["file_name,ink", "", "", *changed(ROWS, 2, "1.png")],
        "row 2: it has 1 fields",
        True,
    ),
    "never closed": (
        "t.csv",
        ["file_name,ink", *changed(ROWS, 3, '2.png,"light')],
        "row 3 (line 4) cannot be read: unexpected end of data. Is a quote in it never closed",
        False,
    ),
    "closed in another row": (
        "t.csv",
        ["file_name,ink", *changed(changed(ROWS, 3, '2.png,"light'), 6, '5.png,heavy"')],
        "row 3: ink: it holds a line break; is a quote open across lines.",
        True,
    ),
    "closed by a quoted row": (
        "t.csv",
        ["file_name,ink", *changed(changed(ROWS, 3, '2.png,"a'), 6, '5.png,"b"')],
        "row 3 (line 4) cannot be read: ',' expected after '\"'",
        False,
    ),
    "text after a quote": (
        "t.csv",
        ["file_name,ink", *changed(ROWS, 3, '2.png,"light" ink')],
        "row 3 (line 4) cannot be read: ',' expected after '\"'",
        False,
    ),
    "endless field": (
        "t.csv",
        ["file_name,ink", *changed(ROWS, 3, '2.png,"' + 200_000 * "a")],
        "row 3 (line 4) cannot be read: field larger than field limit",
        False,
    ),
    "doubled name": ("t.csv", ["file_name,ink,ink", *CAPTIONED], "ink is the name of columns 2 and 3.", False),
    "name doubled but for blanks": ("t.csv", ["file_name,ink, ink", *CAPTIONED], "ink is the name of columns 2", False),
    "blank name": ("t.csv", [",file_name,ink", *("0," + row for row in ROWS)], "column 1 has no name.", False),
    "header never closed": ("t.csv", ['file_name,"ink', *ROWS], "the header of", False),
    "NUL": ("t.csv", ["file_name,ink", *changed(ROWS, 3, "2\0.png,light")], "row 3: cannot read '2\\x00.png'", True),
    "Latin-1": ("t.csv", "file_name,ink\n0.png,schwärzer".encode("latin-1"), "is not UTF-8: 'utf-8' codec", False),
    "UTF-16": ("t.csv", "\n".join(["file_name,ink", *ROWS]).encode("utf-16"), "is not UTF-8", False),
    "no rows": ("t.csv", ["file_name,ink"], "has no rows. Write one line per image.", False),
    "JSON array": (
        "t.jsonl",
        json.dumps(OBJECTS),
        "row 1: line 1 is no JSON object: it belongs to a JSON array",
        False,
    ),
    "JSON array in lines": (
        "t.jsonl",
        "[\n" + ",\n".join(LINES) + "\n]",
        "row 1: line 1 is no JSON object: it belongs to a JSON array. Write one object a line",
        False,
    ),
    "JSON array in blocks": ("t.jsonl", json.dumps(OBJECTS, indent=2), "line 1 is no JSON object: it belongs", False),
    "commas between": ("t.jsonl", ",\n".join(LINES), "row 1: line 1 is no JSON object: a comma follows", False),
    "spread object": (
        "t.jsonl",
        [json.dumps(row, indent=1) for row in OBJECTS],
        "line 1 is no JSON object: the object is cut off, or spread over several lines",
        False,
    ),
    "cut off": ("t.jsonl", "\n".join(LINES)[:-9], "row 8: line 8 is no JSON object: the object is cut off", True),
    "cut off below a blank line": ("t.jsonl", "\n" + "\n".join(LINES)[:-9], "row 8: line 9 is no JSON object", True),
    "no object": ("t.jsonl", changed(LINES, 4, '"x"'), "row 4: line 4 is no JSON object: it is 'x'.", True),
    "null": ("t.jsonl", changed(LINES, 4, "null"), "row 4: line 4 is no JSON object: it is 'None'", True),
    "doubled key": (
        "t.jsonl",
        changed(LINES, 4, '{"file_name": "3.png", "ink": "a", " ink": "b"}'),
        "row 4: line 4 is no JSON object: the key 'ink' stands in it twice.",
        True,
    ),
    "blank key": ("t.jsonl", changed(LINES, 4, '{"file_name": "3.png", "": "a"}'), "a key in it is blank", True),
    "nested label": (
        "t.jsonl",
        changed(LINES, 4, '{"file_name": "3.png", "ink": {"a": 1}}'),
        "row 4: ink: \"{'a': 1}\" is no text or number: dict.",
        True,
    ),
    "lists in a list": ("t.jsonl", changed(LINES, 4, '{"file_name": "3.png", "ink": [["a"]]}'), "list of lists", True),
    "nested path": (
        "t.jsonl",
        changed(LINES, 4, '{"file_name": {"a": 1}, "ink": "a"}'),
        "row 4: cannot read its image (file_name must be a path, got {'a': 1}).",
        True,
    ),
    "bad escape": ("t.jsonl", changed(LINES, 4, '{"file_name": "3.png", "ink": "\\x"}'), "Invalid \\escape at", True),
    "half a character": (
        "t.jsonl",
        changed(LINES, 4, '{"file_name": "3.png", "ink": "\\ud800"}'),
        "row 4: ink: ",
        True,
    ),
    "too deep": (
        "t.jsonl",
        changed(LINES, 4, 100_000 * "["),
        "row 4: line 4 is no JSON object: it is nested too",
        True,
    ),
    "endless number": (
        "t.jsonl",
        changed(LINES, 4, '{"ink": ' + 5000 * "1" + "}"),
        "row 4: line 4 is no JSON ob",
        True,
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_one_line_that_names_file_and_row(read, tmp_path, what):
    name, content, message, _ = WRONG[what]
    with pytest.raises(ValueError, match=r".") as error:
        read(name, content)
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", [what for what, (*_, alone) in WRONG.items() if alone])
def test_a_row_that_is_wrong_can_be_left_out_and_counted(read, what):
    name, content, *_ = WRONG[what]
    whole = what != "closed in another row"  # which takes the rows up to it along
    with pytest.warns(UserWarning, match=r"1 of (8|5) rows cannot be used \(1 × ") as record:
        data = read(name, content, skip_bad=True)
    assert len(data) == (7 if whole else 4)
    assert f"{len(data)} of {8 if whole else 5} rows (1 × " in data.about
    assert any("If these are rows of their own, close it" in str(w.message) for w in record) != whole


@pytest.mark.parametrize("what", [what for what, (*_, alone) in WRONG.items() if not alone])
def test_what_makes_rows_uncertain_cannot_be_left_out(read, what):
    name, content, *_ = WRONG[what]
    with pytest.raises(ValueError, match=name):
        read(name, content, skip_bad=True)


def test_rows_over_several_lines_are_told(read):
    """As of a caption with a line break, or of a quote that only a later row closes."""
    lines = changed(changed(CAPTIONED, 3, '2.png,"a sheet,light'), 6, '5.png,a sheet",heavy')
    with pytest.warns(UserWarning, match=r"1 of 5 rows spread over several lines, .* \(row 3 is lines 4 to 7\)"):
        assert len(read("t.csv", ["file_name,text,ink", *lines])) == 5


@pytest.mark.parametrize(("name", "note"), [("semicolons", "separated by semicolons"), ("tabs", "separated by tabs")])
def test_the_separator_is_told(read, name, note):
    assert note in read(*UNUSUAL[name]).about
