"""One notion of a missing label, of a number and of a class's name."""

import os
import subprocess
import sys
from datetime import date
from decimal import Decimal

import numpy as np
import pandas
import pytest
import torch

from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.data.names import as_text, by_key, find, in_order, is_missing, is_number, normal

NUMBERS = ("0", "-1", "+3", "01", "1.", ".5", "1.50", "1e3", "2E-4")
NO_NUMBERS = ("3_7", "nan", "inf", "-Infinity", "1e999", "0x1f", "１", "١", "1,5", "1 000", "", "1.2.3", "½")
WORDS = ("nan", "NaN", "NA", "N/A", "n/a", "None", "none", "null", "NULL", "?", "-", "–", "#N/A", "<NA>", "NaT", "-nan")


def test_numbers_are_what_tables_write_for_them():
    assert all(map(is_number, NUMBERS))
    assert not any(map(is_number, NO_NUMBERS))


@pytest.mark.parametrize("word", WORDS)
def test_words_for_a_missing_label_are_classes_only_if_kept(word):
    assert is_missing(word)
    assert not is_missing(word, keep=True)


def test_other_words_are_no_missing_labels_and_a_blank_always_is():
    assert is_missing("", keep=True)
    assert not any(map(is_missing, ("no", "0", "nano", "nothing", "--", "N", "unknown")))


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        (("1", "1.0", "01", " 1 ", "+1", "1e0"), "1"),
        (("1.0", "1.0", "1"), "1.0"),  # as it is written most often
        (("-0", "0", "0.0"), "0"),
        (("True", "true", "TRUE"), "TRUE"),
        (("False", "false", "false"), "false"),
        (("caf\u00e9", "cafe\u0301"), "caf\u00e9"),
        (("dark  blue", " dark blue", "dark\u00a0blue"), "dark blue"),
        (("\u212bngstr\u00f6m", "A\u030angstro\u0308m"), "\u00c5ngstr\u00f6m"),
    ],
)
def test_spellings_of_one_class_are_one_class(spellings, name):
    """In the data, and when it is asked for later, by any of them, also in a run that has it spelled otherwise."""
    assert set(in_order([*spellings, "other"])) == {name, "other"}
    for text in spellings:
        for known in spellings:
            assert find(normal(text), by_key(["other", known])) == known
            assert LabelSpace(("other", known)).label_of(text, "y") == 1


@pytest.mark.parametrize(
    "pair",
    [
        ("a", "A"),
        ("yes", "Yes"),
        ("1", "1a"),
        ("3_7", "37"),
        ("１", "1"),
        ("1,0", "1"),
        ("100000000000000000001", "100000000000000000002"),
    ],
)
def test_other_names_keep_their_case_and_characters(pair):
    assert len(in_order(pair)) == 2
    assert LabelSpace(pair).label_of(pair[1], "y") == 1


def test_a_run_that_has_two_spellings_as_two_classes_keeps_them():
    space = LabelSpace(("1", "1.0", "true", "True"))
    assert [space.label_of(text, "y") for text in (*space.values, "01", "TRUE")] == [0, 1, 2, 3, 0, 2]


def test_classes_are_in_the_order_of_numbers_if_all_are_numbers():
    assert in_order(["10", "9", "1", "9"]) == ("1", "9", "10")
    assert in_order(["10", "9", "low"]) == ("10", "9", "low")
    assert in_order(["3_7", "5"]) == ("3_7", "5")


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_the_order_of_classes_depends_on_nothing_but_the_data(seed):
    code = (
        "from ctrl_diffusion.data.names import in_order\n"
        "print(in_order(['True', 'true', '2', '1.0', '1', '01', 'b', 'B', '2.0']), in_order(['1.0', '1', '01', '2']))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "('1', '2', 'B', 'True', 'b') ('1', '2')\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (3.0, "3.0"),
        (True, "True"),
        (" a ", "a"),
        (np.int64(3), "3"),
        (np.float32(0.5), "0.5"),
        (np.bool_(True), "True"),
        (np.str_("a"), "a"),
        (np.array(3), "3"),
        (np.array([3]), "3"),
        (torch.tensor(2), "2"),
        (torch.tensor([0.25]), "0.25"),
        (Decimal("1.50"), "1.50"),
        (date(2020, 1, 2), "2020-01-02"),
        (["a", 1, None], "a;1;"),
        (None, ""),
        (float("nan"), ""),
        (np.float64("nan"), ""),
        (torch.tensor(torch.nan), ""),
        (pandas.NaT, ""),
        (Decimal("nan"), ""),
        ("nan", "nan"),
    ],
)
def test_values_of_many_types_are_labels(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    "value",
    [{"a": 1}, b"a", [[1]], np.zeros(2), torch.zeros(3), object(), "\ud800", 1j, {1}, [{"a": 1}], (), ValueError("x")],
    ids=lambda value: type(value).__name__,
)
def test_values_of_other_types_are_refused_in_one_line(value):
    with pytest.raises(ValueError, match=r".") as error:
        as_text(value)
    assert "\n" not in str(error.value)
