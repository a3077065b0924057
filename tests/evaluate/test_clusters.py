"""Hold errors on drawn conditions against what 200 repeats, with fresh conditions each, give.

The spread of 200 repeats is known to 1/√400: 5 %.
"""

import math
from dataclasses import replace

import pytest
import torch
from drawn import KINDS, LABELS, Drawn

from ctrl_diffusion.evaluate.certificate import worst_conditions
from ctrl_diffusion.evaluate.clusters import cluster_error

REPEATS = 200


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_on_drawn_conditions_is_the_spread_of_repeats(kind):
    """To 20 %, four errors of what 200 repeats know; the errors within are a quarter smaller at least."""
    repeats = [Drawn(kind, seed).figures() for seed in range(REPEATS)]
    within = [Drawn(kind, seed).figures(drawn=False) for seed in range(10)]
    for name in repeats[0]:
        value, error = torch.tensor([figures[name] for figures in repeats], dtype=torch.float64).unbind(1)
        assert float(error.square().mean().sqrt() / value.std()) == pytest.approx(1, abs=0.2), name
        assert sum(figures[name][1] for figures in within) / len(within) < 0.78 * float(error.mean()), name


def biases(kind, members, groups=100):
    """The errors (repeats, 2) of log Z and gap against the truth for the certified pairs, log Z with its standard error
    (repeats, 2), and the share of pairs that are certified."""
    errors, stated, shares = [], [], []
    for seed in range(REPEATS):
        toy = Drawn(kind, seed, groups, members)
        found = toy.certify()
        certified = found.certified.view(groups, LABELS)
        truth = toy.log_z[certified].mean(), toy.true_gap[certified].mean()
        errors.append((found.log_z - float(truth[0]), found.gap - float(truth[1])))
        stated.append((found.log_z, found.log_z_stderr))
        shares.append(float(certified.double().mean()))
    return *(torch.tensor(rows, dtype=torch.float64) for rows in (errors, stated)), sum(shares) / REPEATS


@pytest.mark.parametrize(("kind", "members"), [("gaussian", 64), ("gaussian", 200), ("logistic", 100)])
def test_log_z_of_few_samples_is_hardly_biased_on_drawn_conditions(kind, members):
    """Half a standard error is what is asked; 200 repeats know a mean error to a fourteenth of one."""
    errors, stated, share = biases(kind, members)
    value, error = stated.unbind(1)
    assert share > 0.98
    assert abs(float(errors[:, 0].mean())) < float(error.mean()) / 2
    assert abs(float(errors[:, 1].mean())) < float(error.mean()) / 2, "the gap's error is the larger of the two"
    assert float(error.square().mean().sqrt() / value.std()) == pytest.approx(1, abs=0.2)


def test_certifying_by_hits_lifts_log_z_a_little():
    """Of 64 samples a tenth of the pairs has fewer than ten hits: by chance those whose log Z came out low."""
    errors, _, share = biases("logistic", 64)
    assert share == pytest.approx(0.9, abs=0.05)
    assert 3 * float(errors[:, 0].std()) / REPEATS**0.5 < float(errors[:, 0].mean()) < 0.01


def test_the_error_of_a_ratio_by_hand():
    """Clusters (1, 3), (2), (6): mean 3, S − n m are −2, −1 and 3, and the variance 3/2 · 14/16."""
    values = torch.tensor([[1.0, 3.0], [2.0, 100.0], [math.nan, 6.0], [100.0, 100.0]])
    counted = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    assert cluster_error(values, 4, 0.0, counted) == pytest.approx((1.5 * 14 / 16) ** 0.5)
    unseen = torch.full_like(values, 0.5)
    assert cluster_error(values, 4, 0.0, counted, unseen) == pytest.approx((1.5 * 14 / 16 + 4 * 0.5 / 16) ** 0.5)
    assert cluster_error(values, 1, 0.7, counted) == cluster_error(values[:1], 1, 0.7) == 0.7
    assert cluster_error(values, 4, 0.7, counted & torch.tensor([[False], [True], [False], [False]])) == 0.7


def test_what_is_drawn_changes_errors_alone():
    """Figures are those of enumerated conditions, whose metrics have no list by c or y."""
    toy = Drawn("gaussian", 0, groups=12)
    drawn, fixed = toy.certify(), toy.certify(drawn=False)
    for name in ("objective", "log_z", "log_z_policy", "gap", "ess", "kl"):
        assert getattr(drawn, name) == getattr(fixed, name), name
    assert set(drawn.metrics()) - set(fixed.metrics()) == {"labels", "conditions"}
    assert drawn.metrics()["pairs"] == fixed.metrics()["pairs"]


def test_one_condition_has_the_error_within():
    """Of the other no label is certified: a population of one shows no spread."""
    toy = Drawn("gaussian", 0, groups=2)
    toy.table[1] = -14.0
    drawn, fixed = toy.certify(), toy.certify(drawn=False)
    assert drawn.certified.view(2, -1).sum(1).tolist() == [LABELS, 0]
    for name in ("objective_stderr", "log_z_stderr", "log_z_policy_stderr", "stderr"):
        assert getattr(drawn, name) == getattr(fixed, name) > 0, name
    assert drawn.metrics()["uncertified"] == [f"c = 1, y = {k}" for k in range(LABELS)]
    rows = drawn.metrics()["conditions"]
    assert rows[1] == {"name": "c = 1", "gap_nats": None, "gap_stderr": None, "certified": 0}
    # the samples of a single c are those of the whole: its row is the certificate
    assert rows[0]["gap_nats"] == pytest.approx(drawn.gap, rel=1e-5)
    assert rows[0]["gap_stderr"] == pytest.approx(drawn.stderr, rel=1e-5)


def test_conditions_and_labels_are_listed():
    toy = Drawn("logistic", 3, groups=30, members=64)
    toy.conditions = replace(toy.conditions, names={"y": ["a", "b", "c", "d"]})
    found = toy.certify()
    gap, certified = found.pairs.gap.view(30, LABELS), found.certified.view(30, LABELS)
    assert 0 < int((~certified).sum())
    assert certified.any(1).all()
    conditions, labels = found.metrics()["conditions"], found.metrics()["labels"]
    assert [row["certified"] for row in conditions] == certified.sum(1).tolist()
    total = sum(row["gap_nats"] * row["certified"] for row in conditions)
    assert total / int(certified.sum()) == pytest.approx(found.gap, rel=1e-5)
    for k, row in enumerate(labels):
        column, hits = gap[certified[:, k], k], found.hits.view(30, LABELS)[:, k]
        assert row["name"] == f"y = {'abcd'[k]}"
        assert (row["certified"], row["hits_min"]) == (len(column), float(hits.min()))
        assert row["hits_mean"] == pytest.approx(float(hits.mean()))
        assert row["gap_nats"] == pytest.approx(float(column.mean()), rel=1e-5)
        # c alone differs within a label: the error is the spread of its gaps, and what no sample shows
        assert row["gap_stderr"] == pytest.approx(float(column.std()) / len(column) ** 0.5, rel=0.1)
        assert row["gap_stderr"] >= float(column.std()) / len(column) ** 0.5 * (1 - 1e-5)
    worst = worst_conditions(found, 5)
    gaps = [row["gap_nats"] for row in conditions]
    assert [gaps[g] for g in worst] == sorted(gaps, reverse=True)[:5]


def test_the_worst_conditions_leave_out_those_not_certified():
    toy = Drawn("gaussian", 0, groups=4)
    toy.table[2] = -14.0
    worst = worst_conditions(toy.certify())
    assert sorted(worst) == [0, 1, 3]
