import pytest
import torch

from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.data.labels import NULL


def test_conditions_number_every_pair():
    conditions = Conditions({"c": torch.tensor([7, 8, 9])}, {"ink": 4})
    labels, cond = conditions.of(conditions.all(2))
    assert conditions.pairs == 12
    pairs = list(zip(cond["c"].tolist(), labels["ink"].tolist(), strict=True))
    assert pairs == [(c, y) for c in (7, 8, 9) for y in range(4) for _ in range(2)]
    counts = conditions.draw(30, torch.Generator().manual_seed(0)).bincount(minlength=12)
    assert counts.min() >= 2
    assert counts.max() <= 3


def test_labels_of_several_controls_run_the_last_fastest():
    conditions = Conditions({"c": torch.tensor([7, 8])}, {"ink": 3, "slant": 2})
    assert (conditions.classes, conditions.pairs) == (6, 12)
    pair = conditions.all(1)
    labels, _ = conditions.of(pair)
    assert list(zip(labels["ink"].tolist(), labels["slant"].tolist(), strict=True))[:6] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    assert torch.equal(conditions.label_of(labels), pair % 6)


def test_a_class_that_is_not_known_makes_no_label():
    labels = {"ink": torch.tensor([2, NULL, 1]), "slant": torch.tensor([1, 1, NULL])}
    assert Conditions({}, {"ink": 3, "slant": 2}).label_of(labels).tolist() == [5, NULL, NULL]


def test_a_pair_is_called_by_its_condition_and_its_label():
    names = {"c": ["a dog", "a cat"], "ink": ["light", "heavy"]}
    conditions = Conditions({"c": torch.tensor([7, 8])}, {"ink": 2, "slant": 2}, ("slant",), names=names)
    for pair in range(conditions.pairs):
        group, label = divmod(pair, conditions.classes)
        parts = conditions.name_of_group(group), conditions.name_of_label(label)
        assert conditions.name_of(pair) == ", ".join(parts)
    assert conditions.name_of_group(1) == "c = a cat"
    assert conditions.name_of_label(0) == "ink = light"
    assert Conditions({}, {"ink": 2}, names=names).name_of(1) == "ink = heavy"


def test_a_control_may_be_left_out_but_not_all():
    both = Conditions({}, {"ink": 3, "slant": 2}, ("ink", "slant"))
    rows = set(map(tuple, both.combinations.tolist()))
    assert len(rows) == both.classes == 4 * 3 - 1
    assert (NULL, NULL) not in rows
    assert {(NULL, 1), (2, NULL), (2, 1)} <= rows
    added = Conditions({}, {"ink": 3, "slant": 2}, ("ink",))
    assert (added.combinations[:, 1] != NULL).all()
    assert added.classes == 4 * 2
    assert Conditions({}, {"ink": 3}).combinations.tolist() == [[0], [1], [2]]


@pytest.mark.parametrize("fixed", [(), ("slant",)])
@pytest.mark.parametrize("n", [60, 61])
def test_every_choice_of_controls_is_drawn_as_often_as_the_others(n, fixed):
    """However many labels it has, and each of these as often as the others."""
    conditions = Conditions.for_training({"c": torch.tensor([7, 8])}, {"ink": 4, "slant": 2}, fixed)
    labels, _ = conditions.of(conditions.draw(n, torch.Generator().manual_seed(0)))
    active = torch.stack([y != NULL for y in labels.values()], dim=1)
    choices, counts = active.unique(dim=0, return_counts=True)
    assert len(choices) == (2 if fixed else 3)
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1
    both = active.all(1)
    of_both = (labels["ink"][both] * 2 + labels["slant"][both]).bincount(minlength=8)
    # every (c, y) once before any comes again: two conditions, eight labels
    assert of_both.max() - of_both.min() <= 2
