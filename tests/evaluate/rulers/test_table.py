"""The laws every built-in ruler keeps, and what is refused of it."""

import pytest
import torch

from ctrl_diffusion.data.digits import digits
from ctrl_diffusion.data.labels import NULL, LabelSpace
from ctrl_diffusion.data.letters.rulers import CHARACTERS
from ctrl_diffusion.data.letters.sets import REAL, letters
from ctrl_diffusion.evaluate.rulers.table import RULERS, checked_ruler
from ctrl_diffusion.prior.prior import open_prior

NUMBERS = LabelSpace(("0", "1", "2"), scale=True)
OF_LETTERS = [name for name, ruler in RULERS.items() if ruler.side]


def space_of(name):
    """Labels that a ruler measures."""
    return NUMBERS if RULERS[name].number else LabelSpace(RULERS[name].values)


def pictures(name):
    """A dozen pictures that a ruler is made for, and what they show."""
    real = letters(REAL)
    return (real.x[:12], real.c[:12]) if RULERS[name].side else tuple(part[:12] for part in digits())


@pytest.mark.parametrize("name", RULERS)
def test_a_picture_is_read_alike_alone_and_among_others(name):
    ruler, (x, c) = RULERS[name], pictures(name)
    for measure in filter(None, (ruler.number, ruler.label)):
        together = measure(x, c)
        alone = torch.cat([measure(x[i : i + 1], c[i : i + 1]) for i in range(len(x))])
        assert together.shape == (12,)
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)  # sums in another order
        assert together.isfinite().all()
        assert (ruler.number is measure) or (together >= 0).all()
        assert len(together.unique()) > 1


@pytest.mark.parametrize("name", RULERS)
def test_classes_are_numbered_from_nought_and_named(name):
    ruler, (x, c) = RULERS[name], pictures(name)
    assert ruler.measures
    assert bool(ruler.label) == bool(ruler.values)
    if ruler.label:
        assert ruler.label(x, c).dtype == torch.long
        assert set(ruler.label(x, c).tolist()) <= set(range(len(ruler.values)))


@pytest.mark.parametrize("name", RULERS)
def test_nothing_is_read_of_a_letter_that_is_not_there(name):
    """An empty picture of a digit has no ink and does not lean: both are numbers, as the first runs took them."""
    ruler, (x, c) = RULERS[name], pictures(name)
    for measure in filter(None, (ruler.number, ruler.label)):
        read = measure(torch.full_like(x, -1.0), c)
        nothing = read == NULL if measure is ruler.label else read.isnan()
        assert nothing.all() == bool(ruler.side)
        assert ruler.side or measure is ruler.label or (read == 0).all()


@pytest.mark.parametrize("name", OF_LETTERS)
def test_other_sizes_are_refused(name):
    ruler, space = RULERS[name], space_of(name)
    assert "measures 32 × 32 pixels, and this prior makes 8 × 8" in ruler.refusal("y", space, (1, 8, 8), CHARACTERS)
    assert "32 × 16" in ruler.refusal("y", space, (1, 32, 16), CHARACTERS)
    assert ruler.refusal("y", space, (3, 32, 32), tuple(CHARACTERS)) is None
    with pytest.raises(ValueError, match=r"32 × 32 pixels, got 8 × 8"):
        (ruler.number or ruler.label)(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())


def test_classes_are_no_numbers_and_numbers_no_classes():
    shape, names = (1, 32, 32), tuple(CHARACTERS)
    other = LabelSpace(("no", "yes"))
    said = {name: RULERS[name].refusal("y", other, shape, names) for name in ("ink", "letter-weight", "letter-serif")}
    assert said == {
        "ink": "measures the classes 1, 2, 3, 4 or a number, not the classes of 'y'",
        "letter-weight": "measures a number, not the classes of 'y'",
        "letter-serif": "measures the classes sans, serif, not the classes of 'y'",
    }
    on_scale = RULERS["letter-serif"].refusal("y", NUMBERS, shape, names)
    assert on_scale == "measures the classes sans, serif, not the numbers of 'y'"


@pytest.mark.parametrize("name", RULERS)
def test_what_needs_c_is_refused_where_there_is_none_and_the_rest_is_not(name):
    ruler, shape, space = RULERS[name], (1, 32, 32), space_of(name)
    refusals = [ruler.refusal("y", space, shape, names) for names in ((), ("cat", "dog"))]
    if ruler.subjects:
        assert "needs to know which of 0 … z is shown, and this prior is given no c" in refusals[0]
        assert "this prior has the classes 'cat', 'dog' …" in refusals[1]
        with pytest.raises(ValueError, match="needs to know what each picture shows"):
            ruler.translated(None, ())
    else:
        assert refusals == [None, None]
        assert ruler.translated(None, ()) is None
    assert ruler.refusal("y", space, None, None) is None, "without a prior nothing is asked of it"
    assert ruler.refusal("y", space, shape, tuple(CHARACTERS)) is None


def test_classes_of_the_prior_are_known_by_name():
    """A prior may number its letters in another order, and have fewer."""
    names = ("z", "A", "0")
    c = RULERS["letter-slant"].translated(torch.tensor([2, 0, 1, 1]), names)
    assert [CHARACTERS[i] for i in c.tolist()] == ["0", "z", "A", "A"]
    every = torch.arange(len(CHARACTERS))
    assert torch.equal(RULERS["letter-slant"].translated(every, open_prior("letters").class_names), every)


def test_another_name_is_refused():
    assert checked_ruler("ink") == "ink"
    with pytest.raises(ValueError, match="must be one of ink, slant, letter-weight, letter-slant, letter-w"):
        checked_ruler("weight")
