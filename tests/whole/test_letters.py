"""The builder of the letters, on the fonts that matplotlib brings."""

from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from letters import drawn, faces, fonts, reader, shipped, sift, train

from ctrl_diffusion.data.letters.rulers import BASELINE, CAP, CHARACTERS

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
DEJAVU = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"]


def font_file(name, licence=None):
    return fonts.FontFile(FOLDER / f"{name}.ttf", "matplotlib", licence)


@pytest.fixture(scope="module")
def dejavu():
    drawings = [drawn.face_of(font_file(name, "Bitstream Vera")) for name in DEJAVU]
    return [row for row, _ in drawings], np.stack([glyphs for _, glyphs in drawings])


def test_a_face_says_what_it_is(dejavu):
    rows, _ = dejavu
    assert [row["serif"] for row in rows] == ["sans"] * 4 + ["serif"] * 2
    assert [row["angle"] for row in rows] == [0, 0, 11, 0, 0, 0]
    assert [row["family"] for row in rows] == ["deja vu sans"] * 3 + ["deja vu sans"] + ["deja vu serif"] * 2


def test_capitals_stand_on_the_baseline_and_are_of_one_height(dejavu):
    _, glyphs = dejavu
    for letter in "EHITXZ":
        rows = np.nonzero(glyphs[:, CHARACTERS.index(letter)].max(2) > 128)
        for face in range(len(glyphs)):
            inked = rows[1][rows[0] == face]
            assert (inked.min(), inked.max()) == (BASELINE - CAP, BASELINE - 1)


@pytest.mark.parametrize(
    ("name", "reason"), [("cmsy10", "does not fit the picture"), ("STIXSizOneSymReg", "lacks glyphs")]
)
def test_fonts_of_symbols_are_left_out(name, reason):
    assert drawn.face_of(font_file(name, "OFL")) == reason


def test_a_font_without_a_free_licence_is_left_out(monkeypatch):
    monkeypatch.setattr(faces, "licence_in", lambda text: None)
    assert drawn.face_of(font_file("DejaVuSans")) == "has no licence known as free"


LICENCES = {
    "This Font Software is licensed under the SIL Open Font License": "OFL",
    "GPL-2+ with Font exception": "GPL",
    "lppl1.3c": "LPPL",
    "gfl": "GUST",
    "Permission is hereby granted, free of charge, to any person": "MIT",
    "CC-BY-SA-4.0": "CC-BY",
    "Creative Commons Attribution-NonCommercial": None,
    "All rights reserved": None,
}


@pytest.mark.parametrize("text", LICENCES)
def test_a_licence_is_known_by_its_name(text):
    assert fonts.licence_in(text) == LICENCES[text]


def test_the_licence_of_the_packaging_is_not_that_of_the_font():
    text = "Files: *\nLicense: proprietary\n\nFiles: debian/*\nLicense: GPL-2+\n"
    assert fonts.copyright_licences(text) == "proprietary"


def test_faces_that_look_alike_or_are_no_letters_are_left_out_and_counted(dejavu):
    rows, glyphs = dejavu
    capitals = glyphs[0].copy()  # draws capitals for small letters
    for small in "abcdefghijklmnopqrstuvwxyz":
        capitals[CHARACTERS.index(small)] = capitals[CHARACTERS.index(small.upper())]
    twins = glyphs[4].copy()
    twins[CHARACTERS.index("R")] = twins[CHARACTERS.index("P")]
    pieces = glyphs[5].copy()
    pieces[:, 14:16] = 0
    stay, family, left_out = sift.sifted([*rows, *rows[:4]], np.stack([*glyphs, glyphs[0], capitals, twins, pieces]))
    assert stay.tolist() == list(range(len(DEJAVU)))
    assert left_out == Counter(
        {
            "looks like another face": 1,
            "draws capitals for small letters": 1,
            "draws two letters alike": 1,
            "draws letters in pieces or as outlines": 1,
            f"is one of more than {sift.MOST} faces of a family": 0,
        }
    )
    assert len(set(family[:4])) == 1
    assert family[4] == family[5] != family[0]


def test_a_family_stays_in_its_part_when_others_leave():
    names = [f"family {i // 3}" for i in range(300)]
    family = np.arange(300) // 3
    part = sift.split(family, names)
    assert {name: (part == name).mean() for name in sift.SPLIT} == pytest.approx(sift.SPLIT, abs=0.15)
    kept = np.arange(300) % 7 > 0
    assert (sift.split(family[kept], [n for n, k in zip(names, kept, strict=True) if k]) == part[kept]).all()


def test_letters_that_count_as_one_are_read_as_either():
    group = reader.groups()
    same = [{CHARACTERS[i] for i in np.nonzero(group == number)[:, 0]} for number in group.unique()]
    assert sorted(map(len, same))[-2:] == [2, 3]
    assert {"0", "O"} in same
    assert {"I", "l", "1"} in same


def test_sets_are_dealt_by_family(dejavu):
    rows, glyphs = dejavu
    many = [row | {"angle": 0 if i % 2 else 9} for i, row in enumerate(rows * 6)]
    pool = shipped.Faces(np.tile(glyphs, (6, 1, 1, 1)), many, np.arange(36) // 2, np.array(["pool"] * 36))
    dealt = shipped.deal(pool)
    assert all(dealt[2 * i] == dealt[2 * i + 1] for i in range(18))
    assert set(dealt) == {"weight", "slant", "serif"}
    assert {0, 1} <= set(pool.serif[dealt == "serif"])


def test_a_round_that_was_interrupted_ends_where_it_would_have(dejavu, tmp_path):
    _, glyphs = dejavu
    data, part = train.Glyphs(glyphs, np.zeros(len(glyphs), int)), train.Round(steps=3, batch=4, warm_up=1)

    def fresh():
        torch.manual_seed(0)
        return train.new_network()

    whole, row = train.train_round(fresh(), part, data, data, tmp_path / "whole.pt")
    assert row["held_out_loss"] > 0
    training = train.Training(fresh(), part)
    training.update(data)
    training.save(tmp_path / "half.pt")
    resumed, _ = train.train_round(fresh(), part, data, data, tmp_path / "half.pt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    train.save_pipeline(whole, tmp_path / "prior")
    again = train.load_network(tmp_path / "prior")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)
