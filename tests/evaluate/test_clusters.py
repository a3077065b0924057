"""Hold errors on drawn conditions against what 200 repeats, with fresh conditions each, give.

The toy has every answer in closed form: c ~ N(0, I_2), x_0 ~ N(m(c), 1), p̂(y | x) a Gaussian or a softmax, and
paths of the policy whose log w is normal, of variance twice the gap. The spread of 200 repeats is known to 5 %.
"""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.evaluate.certificate import Slope, certify, worst_conditions
from ctrl_diffusion.evaluate.clusters import cluster_error, clusters_of
from ctrl_diffusion.evaluate.judge import Observation
from ctrl_diffusion.evaluate.scores import Nulled, score_samples, score_target
from ctrl_diffusion.evaluate.verdict import Gain

REPEATS, LABELS, EACH = 200, 4, 6
PLACES = torch.tensor([-1.0, -0.3, 0.4, 1.2], dtype=torch.float64)  # of y on the line
NODES, WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(60))
KINDS = ["gaussian", "logistic"]


def log_p(kind, x):
    """log p̂(y | x) (…, K); the Gaussian is a likelihood of its value at y, at most 1."""
    if kind == "gaussian":
        return -(x[..., None] - PLACES).square() / 2
    return (0.9 * PLACES * x[..., None]).log_softmax(-1)


def true_log_z(kind, mean):
    """Log E[p̂(y | x)] (G, K) for x ~ N(mean, 1): in closed form, or by 60 nodes of Gauss and Hermite."""
    if kind == "gaussian":  # a product of normals, of variances 1 and 1
        return -(mean[:, None] - PLACES).square() / 4 - math.log(2) / 2
    weights = (WEIGHTS / WEIGHTS.sum()).log()[:, None]
    return (log_p(kind, mean[:, None] + NODES) + weights).logsumexp(1)


class Drawn:
    """Conditions that are drawn anew, samples of the prior for each, and what a policy gives on them."""

    def __init__(self, kind, seed, groups=30, members=100):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def coin(share):
            return torch.rand(share.shape, generator=generator, dtype=torch.float64) < share

        self.conditions = Conditions({"c": torch.arange(groups)}, {"y": LABELS}, drawn=True)
        c = normal(groups, 2)
        self.mean = 0.6 * c[:, 0]
        x = self.mean[:, None] + normal(groups, members)
        self.table = log_p(kind, x).float()
        self.log_z = true_log_z(kind, self.mean)
        self.true_gap = 0.2 * (0.6 * c[:, 1]).exp()[:, None].expand(groups, LABELS)
        spread = (2 * self.true_gap[..., None]).sqrt()
        w = self.log_z[..., None] - self.true_gap[..., None] + spread * normal(groups, LABELS, EACH)
        self.log_w = w.flatten().float()
        self.reward = self.log_w.clamp(max=0)
        # what a step of training brought: more for some c than for others
        self.before = (
            self.log_w - (0.5 + 0.5 * c[:, 1]).repeat_interleave(LABELS * EACH) + 0.3 * normal(len(self.log_w))
        )
        # the ruler agrees with p̂, and the policy is right, on some c more than on others
        likes = c[:, 1].sigmoid()
        drawn_y = torch.multinomial(self.table.exp().flatten(0, 1), 1, generator=generator).view(groups, members)
        noise = torch.randint(LABELS, drawn_y.shape, generator=generator)
        self.prior_y = torch.where(coin(likes[:, None].expand(groups, members)), drawn_y, noise)
        asked = self.conditions.all(EACH) % LABELS
        of_c = likes.repeat_interleave(LABELS * EACH)
        self.policy_y = torch.where(coin(of_c), asked, (asked + 1) % LABELS)
        self.outside = coin(of_c / 2).double()
        self.other = {kind: coin(likes[:, None].expand(groups, n)).long().flatten()
                      for kind, n in (("prior", members), ("target", members), ("ctrl", LABELS * EACH))}  # fmt: skip

    def certify(self, drawn=True):
        arguments = self.table, self.reward, torch.zeros_like(self.reward), self.reward - self.log_w
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return certify(replace(self.conditions, drawn=drawn), *arguments)

    def figures(self, drawn=True):
        """Every reported figure with its standard error."""
        conditions, found = replace(self.conditions, drawn=drawn), self.certify(drawn)
        clusters, known = clusters_of(conditions), found.certified.view(-1, LABELS)
        features = torch.zeros(max(self.prior_y.numel(), len(self.policy_y)), 1)
        prior = Observation({"y": self.prior_y.flatten()}, {}, features[: self.prior_y.numel()], None, None)
        policy = Observation({"y": self.policy_y}, {}, features[: len(self.policy_y)], None, self.outside)
        target, ctrl = score_target(prior, self.table, conditions, known), score_samples(policy, conditions)
        nulled = Nulled.from_labels(self.other, 2, self.table, known, clusters)
        slope = Slope.at(1.0, self.table, self.reward, known, clusters)
        gained = Gain.from_paths(self.log_w, self.before, conditions.pairs, clusters)
        return {
            "J": (found.objective, found.objective_stderr), "log Z": (found.log_z, found.log_z_stderr),
            "log Z, policy": (found.log_z_policy, found.log_z_policy_stderr), "gap": (found.gap, found.stderr),
            "target": (target.accuracy, target.accuracy_stderr), "accuracy": (ctrl.accuracy, ctrl.accuracy_stderr),
            "one control": (ctrl.accuracy_of["y"], ctrl.stderr_of["y"]), "slope": (slope.log_z, slope.log_z_stderr),
            "log p̂": (slope.log_p, slope.log_p_stderr), "outside": (ctrl.outside_support, ctrl.outside_stderr),
            "gained": tuple(gained),
        } | {
            f"nulled, {kind}": (float(nulled.shares[kind][1]), float(nulled.stderr[kind][1])) for kind in self.other
        }  # fmt: skip


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
    """The errors of log Z and gap against the truth for the certified pairs (repeats, 2), log Z (repeats, 2) with its
    standard error, and the share of pairs that are certified."""
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
