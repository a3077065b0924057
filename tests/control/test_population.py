"""Conditions of a population: drawn for each sample, and measured on some."""

import pytest
import torch

from ctrl_diffusion.control.conditions import MOST_ENUMERATED, Conditions, ConditionSplit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def population(groups=1000, weights=None, **controls):
    c, names = {"c": torch.arange(groups) + 5}, {"c": [f"prompt {i}" for i in range(groups)]}
    return Conditions(c, controls or {"ink": 4}, names=names, pooled=True, weights=weights)


@pytest.mark.parametrize("n", [64, 63])
def test_labels_come_equally_often_and_conditions_spread(n):
    conditions = population()
    pair = conditions.draw(n, generator())
    labels, cond = conditions.of(pair)
    counts = labels["ink"].bincount(minlength=4)
    assert counts.max() - counts.min() <= 1
    assert len(cond["c"].unique()) == n, "no condition twice where there are more than samples"
    # one in each of n equal parts of the list
    assert torch.equal(
        (((cond["c"] - 5).double() + 0.5) * n / 1000).long().sort().values.diff().clamp(0, 1), torch.ones(n - 1).long()
    )


def test_conditions_come_as_often_as_they_weigh():
    weights = torch.tensor([1.0, 0.0, 3.0])
    conditions = population(3, weights)
    drawn = conditions.of(conditions.draw(400, generator()))[1]["c"] - 5
    assert drawn.bincount(minlength=3).tolist() == [100, 0, 300]  # stratified: exact but for the remainder
    assert conditions.spread(8).tolist() == [0, 0, 2, 2, 2, 2, 2, 2]
    assert set(conditions.sample(2, generator()).cond["c"].tolist()) == {5, 7}


@pytest.mark.parametrize("groups", [3, 1000])
def test_samples_of_a_pool_keep_their_condition(groups):
    """A row of the pool is regressed under the condition it was drawn with, whatever pair was drawn first."""
    conditions, members = population(groups), 60
    pair = conditions.draw(32, generator())
    cell = conditions.cell(pair)
    assert cell.max() < conditions.strata == 4
    member = torch.randint(members, (32,), generator=generator(1))
    row = conditions.row_of(cell, member, members)
    assert torch.equal(row, member), "one table for all conditions"
    again = conditions.pair_of(cell, row, members)
    assert torch.equal(again % 4, pair % 4)
    assert torch.equal(again // 4, conditions.spread(members)[row])


def test_enumerated_conditions_number_as_before():
    conditions, members = Conditions({"c": torch.arange(3)}, {"ink": 4}), 20
    pair = conditions.draw(32, generator())
    row = conditions.row_of(conditions.cell(pair), torch.zeros(32).long(), members)
    assert torch.equal(row, pair // 4 * members)
    assert torch.equal(conditions.pair_of(pair, row, 3 * members), pair)
    assert conditions.spread(6).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_sample_is_enumerated_and_its_errors_count_how_conditions_differ():
    part = population().sample(10, generator())
    assert (part.groups, part.pooled, part.drawn, part.pairs) == (10, False, True, 40)
    assert part.names["c"] == [f"prompt {c - 5}" for c in part.cond["c"].tolist()]
    assert population(7).sample(10, generator()).groups == 7, "all, if there are no more"
    assert part.name_of(4) == f"c = prompt {int(part.cond['c'][1]) - 5}, ink = 0"
    assert population().name_of(2) == "ink = 2"


@pytest.mark.parametrize(("known", "held_out"), [(range(10), []), (range(10), [2, 5]), (range(200), range(50, 60))])
def test_a_split_has_every_condition_once(known, held_out):
    split = ConditionSplit.of(known, held_out, 0)
    assert sorted([*split.trained, *split.held_out]) == list(known)
    assert split.pooled == (len(held_out) > 0)
    assert set(split.measured) <= set(split.trained)
    assert split.measured == sorted(split.measured)
    assert len(split.measured) == min(MOST_ENUMERATED, len(split.trained))
    assert set(split.measured_held_out) == set(held_out)
    if split.pooled and len(known) > 100:
        assert split.trained != sorted(split.trained), "an order in the list may not alias with the pool's"
        assert split != ConditionSplit.of(known, held_out, 1)
