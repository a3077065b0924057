import pytest
import torch

from ctrl_diffusion import demo
from ctrl_diffusion.classifier import Classifier
from ctrl_diffusion.data import Conditions
from ctrl_diffusion.evaluate import (
    Judge,
    frechet_distance,
    nearest_distance,
    score_samples,
    score_target,
    weighted_diversity,
)


def test_weighted_diversity_against_a_double_loop():
    features, weights = torch.randn(2, 5, 3), torch.rand(2, 5, 4)
    weights = weights / weights.sum(1, keepdim=True)
    found = weighted_diversity(features, weights)
    for g in range(2):
        for k in range(4):
            pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
            w = {(i, j): weights[g, i, k] * weights[g, j, k] for i, j in pairs}
            expected = sum(w[i, j] * (features[g, i] - features[g, j]).norm() for i, j in pairs) / sum(w.values())
            torch.testing.assert_close(found[g, k], expected)


def test_one_sample_that_owns_the_weight_has_no_diversity():
    weights = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1)
    assert weighted_diversity(torch.randn(1, 3, 2), weights).item() == 0.0


@pytest.mark.parametrize("with_reader", [True, False])
def test_a_target_without_reward_is_the_prior_itself(with_reader):
    """With equal rewards the weights are even: target and samples must agree on the same images."""
    x, reader = demo.offline_dataset(seed=0).x[:40], Classifier(1, 10, grid=4).eval().requires_grad_(False)
    judge = Judge(lambda x: torch.zeros(len(x), dtype=torch.long), reader if with_reader else None)
    target = score_target(x, torch.zeros(10, 4, 1), judge)
    samples = score_samples(x, Conditions({"c": torch.arange(10)}, "y", 1), judge)
    assert target.accuracy == samples.accuracy == samples.macro_f1 == 1.0
    torch.testing.assert_close(torch.tensor(target.diversity), torch.tensor(samples.diversity))
    if with_reader:
        torch.testing.assert_close(torch.tensor(target.class_accuracy), torch.tensor(samples.class_accuracy))
    else:
        assert target.class_accuracy is samples.class_accuracy is None


def test_a_sharp_reward_picks_what_it_rewards():
    y = demo.ink_ruler(x := demo.offline_dataset(seed=0).x[:40])
    table = 50.0 * torch.nn.functional.one_hot(y, 4).float().view(1, 40, 4)
    target = score_target(x, table, Judge(demo.ink_ruler))
    assert target.accuracy > 1 - 1e-6
    torch.testing.assert_close(target.confusion, torch.eye(4), rtol=0, atol=1e-6)


def test_confusion_has_what_was_asked_in_its_rows():
    conditions = Conditions({}, "y", 3)  # six samples, two for each class in turn
    came = torch.tensor([0, 1, 1, 1, 0, 2])
    score = score_samples(torch.zeros(6, 1, 2, 2), conditions, Judge(lambda x: came))
    assert score.confusion.tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    assert score.accuracy == pytest.approx(4 / 6)


def test_frechet_distance_is_zero_on_equal_sets_and_grows_with_a_shift():
    x = demo.offline_dataset(seed=0).x
    reader = Classifier(1, 10, grid=4).eval().requires_grad_(False)
    assert abs(frechet_distance(x, x, reader)) < 1e-3
    assert frechet_distance(x, x + 0.3, reader) > 10 * abs(frechet_distance(x, x, reader))


def test_nearest_distance():
    reference = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    torch.testing.assert_close(
        nearest_distance(torch.tensor([[3.0, 0.0], [3.0, 4.0]]), reference), torch.tensor([3.0, 0.0])
    )
