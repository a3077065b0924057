import json
import math

import pytest
import torch

from ctrl_diffusion.commands.jobs.testbed import bias_job
from ctrl_diffusion.exact.bias import (
    FEW,
    FLOOR,
    LEARNER,
    MANY,
    PLUG_IN,
    SPACING,
    Histogram,
    counted_kl,
    examples,
    noisy_classifier,
    pair_of,
    programme,
    sampled,
    selecting_samplers,
    target_samples,
)  # fmt: skip
from ctrl_diffusion.exact.mixtures import posterior
from ctrl_diffusion.exact.task import SCHEDULES, Answers, Task
from ctrl_diffusion.guide.reconstruction import DPS
from ctrl_diffusion.system.progress import JobOptions

GUIDED = [PLUG_IN, "classifier guidance", "DPS", "MPGD", "classifier-free guidance", LEARNER]
CHOOSING = ["TDS", "Feynman–Kac", "importance", "best of K"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the quick job leaves: its folder and rows."""
    folder = tmp_path_factory.mktemp("bias") / "run"
    rows = bias_job(folder, options=JobOptions(quick=True, command="as typed"))
    assert len(json.loads((folder / "bias.json").read_text())["rows"]) == len(rows)
    return folder, rows


def rows_of(rows, method, **which):
    return [row for row in rows if row["method"] == method and which.items() <= row.items()]


def test_the_job_leaves_every_method_and_a_page(found):
    folder, rows = found
    (_, _, steps) = programme(quick=True)[0]
    for method in (FLOOR, *GUIDED):
        assert {row["steps"] for row in rows_of(rows, method)} == set(steps)
    for method in CHOOSING:
        assert [row["particles"] for row in rows_of(rows, method)] == [4, 16]
    assert [row["labels"] for row in rows_of(rows, "classifier-free guidance")] == [FEW, MANY] * 2
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "as typed" in page
    assert (folder / "bias.png").stat().st_size > 10_000


def test_the_floor_is_that_of_the_answers_and_nobody_is_below_it(found):
    _, rows = found
    for row in rows:
        task = Task(row["schedule"], row["likelihood"], steps=row["steps"])
        if row["method"] == FLOOR:
            pair = pair_of(task)
            assert row["floor_nats"] == row["gap_nats"] == pytest.approx(float(Answers(task, SPACING).floors[pair]))
        if row["gap_nats"] is not None:
            assert row["gap_nats"] >= row["floor_nats"]
            assert row["gap_nats"] > row["true_kl_nats"] > 0
            assert row["true_kl_stderr"] == 0


def test_rejection_is_exact_and_particles_make_up_for_it(found):
    _, rows = found
    (exact,) = rows_of(rows, "rejection")
    assert abs(exact["true_kl_nats"]) < 3 * exact["true_kl_stderr"]
    few, many = rows_of(rows, "importance")
    assert few["true_kl_nats"] > 3 * few["true_kl_stderr"]
    assert many["true_kl_nats"] < few["true_kl_nats"] - 2 * math.hypot(few["true_kl_stderr"], many["true_kl_stderr"])
    # the best of many is further from the tilt than the best of few: no number of them helps
    few, many = rows_of(rows, "best of K")
    assert many["true_kl_nats"] > few["true_kl_nats"] + 3 * math.hypot(few["true_kl_stderr"], many["true_kl_stderr"])


def test_what_one_sample_costs(found):
    """Prior and p̂, forwards and back: the table of docs/why/baselines.md."""
    _, rows = found
    n, kinds = rows[0]["steps"], ("network_evaluations", "classifier_evaluations")
    kinds += ("gradient_evaluations", "classifier_gradients")
    expected = {
        PLUG_IN: (n + 1, n, 0, n), "classifier guidance": (n + 1, n, 0, n), "DPS": (n + 1, n, n, n),
        "MPGD": (n + 1, n, 0, n), "classifier-free guidance": (n + 1, 0, 0, 0), LEARNER: (n + 1, 0, 0, 0),
        "TDS": (4 * (n + 1), 4 * (n + 1), 4 * n, 4 * n), "best of K": (4 * (n + 1), 4, 0, 0),
        FLOOR: (None, None, None, None),
    }  # fmt: skip
    for method, cost in expected.items():
        assert tuple(rows_of(rows, method, steps=n)[0][kind] for kind in kinds) == cost


def test_the_plug_in_falls_with_the_steps_and_the_excess_of_dps_does_not():
    """Both on lattices. The plug-in's gap is of order 1/N, the KL of its samples of 1/N²
    (tests/guide/test_classifier_guidance.py says why)."""
    plugged, kls, excess = [], [], []
    for steps in (20, 40):
        task = Task("flow", "logistic", steps=steps)
        answers, pair = Answers(task, SPACING), pair_of(task)
        gap = answers.gap(answers.outcome(DPS().steered(task.prior(), task.reward()), pair), pair)
        exact = answers.plugged_in(pair)
        plugged.append(answers.gap(exact, pair))
        kls.append(exact.true_kl)
        excess.append(gap - plugged[-1])
    assert plugged[1] < 0.65 * plugged[0]  # 0.5, and room for the next order
    assert kls[1] < 0.4 * kls[0]  # 0.25
    assert excess[1] > 0.8 * excess[0]  # it comes to its own limit like 1/N
    assert excess[1] > 10 * plugged[1]


@pytest.mark.parametrize("same", [True, False])
def test_what_is_counted_is_unbiased_and_its_error_known(same):
    """n samples of f on m cells, R times over; without the correction the mean would be 0.019 too large."""
    generator, m, n, runs = torch.Generator().manual_seed(0), 20, 500, 400
    q = torch.linspace(1, 3, m, dtype=torch.float64)
    f = q if same else q.flip(0)
    q, f = q / q.sum(), f / f.sum()
    exact = float((f * (f / q).log()).sum())
    drawn = f.expand(runs, m).multinomial(n, replacement=True, generator=generator)
    kls, errors = zip(*(counted_kl(row.bincount(minlength=m), q) for row in drawn), strict=True)
    kls, rest = torch.tensor(kls), float((1 / f).sum() - 1) / (12 * n**2)  # the next order of the bias
    assert float(kls.mean()) == pytest.approx(exact, abs=4 * float(kls.std()) / runs**0.5 + rest)
    # a standard deviation of R normal numbers is known to 1/√(2 R) = 3.5 %, of the skew ones here to about 5 %
    assert float(torch.tensor(errors).mean()) == pytest.approx(float(kls.std()), rel=0.2)


def test_rare_cells_count_as_one():
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.7 * torch.randn(50_000, 2, generator=generator)
    histogram = Histogram(x_0, least=0.01)
    assert float(histogram.share.sum()) == pytest.approx(1)
    assert (histogram.share[:-1] >= 0.01).all()
    kl, error = histogram.kl(0.7 * torch.randn(2000, 2, generator=generator))
    assert abs(kl) < 4 * error
    assert histogram.kl(0.7 * torch.randn(2000, 2, generator=generator) + 0.3)[0] > 4 * error
    assert math.isfinite(histogram.kl(torch.full((10, 2), 99.0))[0])  # beyond the grid is the last cell


@pytest.mark.parametrize("likelihood", ["logistic", "linear-Gaussian", "component"])
def test_labelled_examples_are_of_the_joint(likelihood):
    """Reweighing samples of the prior by p(y | x) gives the same mean of x_0 for each y."""
    task, n, generator = Task("flow", likelihood), 20_000, torch.Generator().manual_seed(0)
    x, y, c = examples(task, n, generator)
    assert len(x) == len(y) == len(c) == n
    ours = x[(y == 0) & (c == 1)]
    plain = task.prior().sample(n, generator, torch.ones(n, dtype=torch.long))
    (p,) = (each.log_prob(plain)[:, 0].exp() for each in task.likelihoods().values())
    w = p / p.sum()
    exact, variance = w @ plain, w @ plain.square() - (w @ plain) ** 2
    error = (variance * (1 / len(ours) + w.square().sum())).sqrt()
    assert ((ours.mean(0) - exact).abs() < 4 * error).all()


def test_rejection_knows_the_bound_of_a_density():
    """Whose top lies above it in single precision, by rounding, if nothing is added."""
    task, n = Task("flow", "linear-Gaussian", steps=10), 1000
    answers, pair = Answers(task, SPACING), pair_of(task)
    (rejection,) = selecting_samplers(task, ())
    x_0, _ = sampled(rejection, task, pair, n, seed=0)
    kl, error = Histogram(target_samples(task, answers, pair, 100_000, seed=0), 5 / n).kl(x_0)
    assert abs(kl) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_continuous_y_is_fitted_as_measured(schedule):
    """Its densities of the levels are p(y | x_t), which is known: the tilted mixture at t over the prior's.

    A network of this size misses 0.08 of their mean with 20,000 labels and 0.06 with 100,000; p(y | E[x_0 | x_t]) 0.11.
    """
    task = Task(schedule, "linear-Gaussian")
    fitted, (likelihood,) = noisy_classifier(task, 20_000, 20, 0), task.likelihoods().values()
    prior = task.prior()
    x, c = prior.sample(2000, torch.Generator().manual_seed(1), torch.ones(2000).long()), torch.ones(2000).long()
    t = task.times[-2]
    alpha, sigma = (float(value) for value in prior.schedule(t))
    x_t = alpha * x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    tilts = [posterior(prior, likelihood, k) for k in range(likelihood.classes)]
    truth = torch.stack([tilted.log_density(x_t, t, c) + log_z[1] for tilted, log_z in tilts], dim=1)
    truth = (truth - prior.log_density(x_t, t, c)[:, None]).exp()
    plugged_in = likelihood.log_prob(prior(x_t, t, c=c)).exp()
    miss, other = ((found - truth).abs().mean() for found in (fitted.log_prob(x_t, t, c=c).exp(), plugged_in))
    assert miss < 0.09 * truth.mean()
    assert miss < other
