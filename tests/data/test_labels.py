import pytest
import torch

from ctrl_diffusion.data.labels import NULL, LabelSpace

CLASSES = LabelSpace(("light", "heavy", "black"))
SCALE = LabelSpace(("10", "15", "20", "25"), scale=True)


def test_classes_have_numbers_and_names():
    assert CLASSES.size == 3
    assert [CLASSES.label_of(value, "ink") for value in CLASSES.values] == [0, 1, 2]
    assert [CLASSES.text_of(label) for label in (0, 2, NULL)] == ["light", "black", ""]
    y = torch.tensor([2, 0, 1])
    assert CLASSES.nearest(y) is y
    with pytest.raises(ValueError, match="ink must be one of light, heavy, black, got '1'"):
        CLASSES.label_of(1, "ink")


def test_a_scale_has_places_between_its_levels():
    assert SCALE.label_of("17.5", "ink") == SCALE.label_of(17.5, "ink") == 1.5
    assert (SCALE.text_of(1.5), SCALE.text_of(float(NULL))) == ("17.5", "")
    assert SCALE.places(torch.tensor([10.0, 25.0, 40.0])).tolist() == [0.0, 3.0, 6.0]
    assert SCALE.nearest(torch.tensor([-0.7, 1.4, 1.6, 3.9])).tolist() == [0, 1, 2, 3]
    assert SCALE.nearest(torch.tensor([1.4, torch.nan])).tolist() == [1, NULL], "nothing was measured"
    for value in ("9.9", "25.1", "much", "nan"):
        with pytest.raises(ValueError, match=f"ink must be a number in 10 … 25, got '{value}'"):
            SCALE.label_of(value, "ink")


def test_the_levels_of_a_scale_are_those_of_the_central_numbers():
    space = LabelSpace.from_numbers(map(str, range(101)))
    assert space.scale
    assert (space.size, space.values[0], space.values[4], space.values[-1]) == (9, "5", "50", "95")


@pytest.mark.parametrize("space", [CLASSES, SCALE], ids=["classes", "scale"])
def test_labels_outside_of_their_space_are_refused(space):
    last = space.size - 1
    space.check(torch.tensor([0, last, NULL]), "ink")
    for label in (-2, space.size):
        with pytest.raises(ValueError, match=rf"labels of 'ink' must lie in 0 … {last} \(−1 for null\), got {label}"):
            space.check(torch.tensor([label]), "ink")


def test_only_a_scale_has_labels_that_are_no_whole_numbers():
    SCALE.check(torch.tensor([0.5, 3.0, NULL]), "ink")
    with pytest.raises(ValueError, match="labels of 'ink' must lie in 0 … 3"):
        SCALE.check(torch.tensor([-0.5]), "ink")
    with pytest.raises(ValueError, match="labels of 'ink' are classes: whole numbers, got torch.float32"):
        CLASSES.check(torch.tensor([0.5]), "ink")
