import math
from dataclasses import replace

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.evaluate.fidelity import Yardstick, frechet_distance, kernel_distance, manifolds, nearest_distance
from ctrl_diffusion.evaluate.judge import SecondOpinion


def test_frechet_distance_of_two_clouds_is_that_of_their_moments():
    """Clouds that are one another's image: ‖μ‖² + Σ (σ − σ')²; eigenvalues' roots cost half the digits."""
    x = torch.randn(400, 3, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky((x - x.mean(0)).mT.cov())).mT
    y = 2.0 * x + torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    assert frechet_distance(x, y) == pytest.approx(5.0 + 3 * 1.0, rel=1e-4)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-4)


def test_nearest_distance():
    reference = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(
        nearest_distance(torch.tensor([[3.0, 0.0], [3.0, 4.0]]), reference), torch.tensor([3.0, 0.0])
    )


def test_kernel_distance_of_one_part_is_torchmetrics():
    x, y = torch.randn(40, 5), torch.randn(40, 5) + 0.5
    expected = float(poly_mmd(x.double(), y.double(), 3, None, 1.0))
    assert kernel_distance([x], [y]) == pytest.approx(expected)


def test_kernel_distance_is_unbiased_also_of_few_samples_of_each_part():
    """Two mixtures of the same two far parts: the mean over many draws is 0 within three of its standard errors.

    With all pairs of different x alike, part or not, it would be off by (1/2 − 3/7) of what parts differ by.
    """
    generator = torch.Generator().manual_seed(0)

    def parts(n):
        return [torch.randn(n, 4, generator=generator) + shift for shift in (0.0, 3.0)]

    found = torch.tensor([kernel_distance(parts(30), parts(4)) for _ in range(200)])
    assert abs(found.mean()) < 3 * found.std() / 200**0.5
    x = torch.cat(parts(4)).double()
    k = (x @ x.mT / 4 + 1) ** 3
    difference = k[:4, :4].mean() + k[4:, 4:].mean() - 2 * k[:4, 4:].mean()
    assert 3 * found.std() / 200**0.5 < (1 / 2 - 3 / 7) * difference / 2, "the error is small enough to tell"


def test_manifolds_of_equal_far_and_collapsed_sets():
    x = torch.randn(200, 2)
    assert manifolds(x, x) == (1.0, 1.0, 1.0)
    assert manifolds(x, x + 100) == (0.0, 0.0, 0.0)
    precision, recall, coverage = manifolds(x, x[:1].repeat(200, 1) + 1e-3 * torch.randn(200, 2))
    assert precision == 1.0, "all lie where real x are"
    assert max(recall, coverage) < 0.2, "and hardly any real x where they are"


def observed(x, group):
    return SecondOpinion({"y": lambda x, c: (x.flatten(1).mean(1) > 0).long()}).measure_batch(x, group)


def test_fidelity_is_taken_within_what_was_asked_for():
    """Samples that ignore y are drawn from the right x over all, and only a distance within y can tell."""
    conditions = Conditions({"c": torch.arange(2)}, {"y": 2})
    sign = torch.tensor([-1.0, 1.0])
    real = 0.1 * torch.randn(400, 1, 1, 2) + sign[torch.arange(400) % 2].view(-1, 1, 1, 1)
    group = torch.arange(400) // 200
    yardstick = Yardstick.from_observations(conditions, observed(real, group), group, observed(real, group))
    asked = conditions.all(100) % 2
    right = 0.1 * torch.randn(400, 1, 1, 2) + sign[asked].view(-1, 1, 1, 1)
    deaf = right[torch.randperm(400)]
    collapsed = right - right + sign[asked].view(-1, 1, 1, 1)
    found = {
        name: yardstick.fidelity(x.flatten(1)) for name, x in (("right", right), ("deaf", deaf), ("one", collapsed))
    }
    assert found["right"].frechet < 0.02 < 0.5 < found["deaf"].frechet
    assert abs(found["right"].kernel) < 0.1 < 0.5 < found["deaf"].kernel
    assert found["right"].precision > 0.9 > 0.6 > found["deaf"].precision
    assert found["right"].diversity_ratio == pytest.approx(1.0, abs=0.1)  # standard error about 1/√200 of the spread
    assert found["one"].diversity_ratio == pytest.approx(0.0, abs=1e-6)
    assert found["one"].recall == 0.0


def test_real_x_that_could_not_be_measured_are_of_no_pair():
    conditions, x, group = (
        Conditions({"c": torch.arange(2)}, {"y": 2}),
        torch.randn(40, 1, 1, 2),
        torch.arange(40) // 20,
    )
    seen = replace(observed(x, group), labels={"y": torch.tensor([0, 1, NULL, 1]).repeat(10)})
    yardstick = Yardstick.from_observations(conditions, seen, group, seen)
    assert list(map(len, yardstick.real)) == [5, 10, 5, 10]


def test_what_no_sample_of_the_prior_has_is_left_out_of_the_diversity():
    conditions = Conditions({}, {"y": 2})
    x = 1 + 0.1 * torch.rand(50, 1, 1, 2)  # y = 1 everywhere
    yardstick = Yardstick.from_observations(
        conditions,
        observed(torch.cat([x, -x]), torch.zeros(100).long()),
        torch.zeros(100).long(),
        observed(x, torch.zeros(50).long()),
    )
    assert math.isnan(yardstick.diversity[0])
    ratio = yardstick.fidelity(torch.cat([-x, x]).flatten(1)).diversity_ratio
    assert ratio == pytest.approx(1.0, abs=1e-4)


def test_a_label_that_no_real_x_has_is_left_out_of_the_distances():
    conditions = Conditions({}, {"y": 2})
    x, none = 1 + 0.1 * torch.rand(60, 1, 1, 2), torch.zeros(60).long()
    yardstick = Yardstick.from_observations(
        conditions, observed(x, none), none, observed(torch.cat([x, -x]), torch.zeros(120).long())
    )
    found = yardstick.fidelity(torch.cat([-x, x]).flatten(1))
    assert found.frechet == pytest.approx(0.0, abs=1e-4)  # of y = 1 alone, whose samples are the real x themselves
    assert found.precision == found.recall == found.coverage == 1.0


def test_real_x_that_were_held_out_score_as_an_exact_sampler_does():
    """Over repeats of the same sizes: both are draws of what is real, and their floors are one; neither is 0 or 1."""
    conditions, generator = Conditions({"c": torch.arange(2)}, {"y": 2}), torch.Generator().manual_seed(0)
    n, repeats = 24, 40

    def drawn(count):  # of every (c, y) in turn
        sign = torch.tensor([-1.0, 1.0])[conditions.all(count) % 2].view(-1, 1, 1, 1)
        return sign + 0.3 * torch.randn(4 * count, 1, 1, 4, generator=generator)

    group = torch.arange(4 * 3 * n) // (2 * 3 * n)
    differences = []
    for seed in range(repeats):
        real = observed(drawn(3 * n), group)
        yardstick = Yardstick.from_observations(conditions, real, group, real, held_out=n, seed=seed)
        assert [len(x) for x in yardstick.held_out] == [n] * 4
        assert [len(x) for x in yardstick.real] == [2 * n] * 4
        floor, exact = yardstick.fidelity_of_real(), yardstick.fidelity(drawn(n).flatten(1))
        assert floor.frechet > 1e-3, "single precision alone leaves 1e-4"
        differences.append(torch.tensor([*vars(floor).values()]) - torch.tensor([*vars(exact).values()]))
    differences = torch.stack(differences)
    error = differences.std(0) / repeats**0.5
    assert (differences.mean(0).abs() < 4 * error).all()


@pytest.mark.parametrize(("count", "held_out", "kept"), [(3, 5, 3), (4, 5, 2), (9, 5, 5), (30, 5, 25)])
def test_at_most_half_of_a_pair_is_held_out_and_nothing_of_a_rare_one(count, held_out, kept):
    conditions, none = Conditions({}, {"y": 2}), torch.zeros(2 * count).long()
    x = torch.cat([torch.ones(count), -torch.ones(count)]).view(-1, 1, 1, 1) * torch.rand(2 * count, 1, 1, 3)
    real = observed(x, none)
    yardstick = Yardstick.from_observations(conditions, real, none, real, held_out, seed=3)
    for part, rest in zip(yardstick.real, yardstick.held_out, strict=True):
        assert (len(part), len(rest)) == (kept, count - kept)
        both = torch.cat([part, rest])
        assert len(both.unique(dim=0)) == count, "each once"
    assert (yardstick.fidelity_of_real() is None) == (count == 3)
    whole = Yardstick.from_observations(conditions, real, none, real)
    assert whole.fidelity_of_real() is None
    for y, part in enumerate(whole.real):
        assert torch.equal(part, real.features[real.labels["y"] == y] / whole.scale)
