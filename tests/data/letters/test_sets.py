import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from letters.fonts import FREE

from ctrl_diffusion.data.letters import sets
from ctrl_diffusion.data.letters.rulers import CHARACTERS
from ctrl_diffusion.data.letters.sets import REAL, SERIF, SETS, SLANT, WEIGHT, letters
from ctrl_diffusion.evaluate.rulers.table import RULERS
from ctrl_diffusion.reward.scorer import Classifier

FONTS = Path(__file__).parents[3] / "bench" / "results" / "letters-fonts.json"


@pytest.fixture(scope="module")
def table():
    return json.loads(FONTS.read_text(encoding="utf-8"))["table"]


def families_of(table, part):
    return {row["family"] for row in table if row["part"] == part}


def test_the_labelled_sets_share_no_font_with_each_other_nor_with_the_prior(table):
    families = {name: set(letters(name).family.tolist()) for name in (*SETS, REAL)}
    assert not any(families[a] & families[b] for a, b in combinations(families, 2))
    assert set().union(*(families[name] for name in SETS)) <= families_of(table, "pool")
    assert families[REAL] <= families_of(table, "test")
    parts = [families_of(table, part) for part in ("train", "pool", "judge", "test")]
    assert not any(a & b for a, b in combinations(parts, 2))


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_500_different_letters_with_labels(name):
    x, c, y, family = letters(name)
    assert x.shape == (500, 1, 32, 32)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert len(x.flatten(1).unique(dim=0)) >= 495  # a stem of I and l may be the same picture
    assert len(c) == len(y) == len(family) == 500
    assert c.max() < len(CHARACTERS)
    assert len(c.unique()) > 55


@pytest.mark.parametrize("name", [WEIGHT, SLANT])
def test_a_label_on_a_scale_is_what_the_ruler_reads(name):
    x, c, y, _ = letters(name)
    torch.testing.assert_close(RULERS[f"letter-{name}"].number(x[:50], c[:50]), y[:50], rtol=1e-4, atol=1e-4)
    assert y.isfinite().all()


def test_serif_has_both_classes_alike():
    assert letters(SERIF).y.bincount().tolist() == [250, 250]


def test_the_judge_of_serif_reads_labels_it_was_not_fitted_on():
    judge = Classifier.load(sets.JUDGE)
    x, c, y, _ = letters(SERIF)
    right = (judge.log_prob(x, c).argmax(1) == y).float().mean()
    assert right > 0.8  # half by chance; some letters hardly have serifs
    assert sum(file.stat().st_size for file in sets.JUDGE.iterdir()) <= 500_000


def test_every_family_has_a_licence_that_is_free(table):
    assert {row["licence"] for row in table} <= set(FREE.values())
    assert all(row["name"] and row["package"] for row in table)


def test_what_ships_is_small_and_another_name_is_refused():
    folder = sets.FILE.parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 2_000_000
    with pytest.raises(ValueError, match=r"weight, slant, serif and real; got 'bold'"):
        letters("bold")
