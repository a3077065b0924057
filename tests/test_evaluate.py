import torch

from ctrl_diffusion import demo
from ctrl_diffusion.classifier import Classifier
from ctrl_diffusion.evaluate import frechet_distance, nearest_distance, score_samples, score_target, weighted_diversity


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


def test_a_target_without_reward_is_the_prior_itself():
    """With equal rewards the weights are even: target and samples must agree on the same images."""
    x, reader = demo.offline_dataset(seed=0).x[:40], Classifier(1, 10, grid=4).eval().requires_grad_(False)
    target = score_target(x, torch.zeros(10, 4, 1), lambda x: torch.zeros(len(x), dtype=torch.long), reader)
    c = torch.arange(10).repeat_interleave(4)
    zeros = torch.zeros(40, dtype=torch.long)
    samples = score_samples(x, zeros, c, 10, lambda x: zeros, reader)
    assert target.accuracy == samples.accuracy == samples.macro_f1 == 1.0
    torch.testing.assert_close(torch.tensor(target.diversity), torch.tensor(samples.diversity))
    torch.testing.assert_close(torch.tensor(target.class_accuracy), torch.tensor(samples.class_accuracy))


def test_a_sharp_reward_picks_what_it_rewards():
    x, reader = demo.offline_dataset(seed=0).x[:40], Classifier(1, 10, grid=4).eval().requires_grad_(False)
    y = demo.ink_ruler(x)
    table = 50.0 * torch.nn.functional.one_hot(y, 4).float().view(1, 40, 4)
    assert score_target(x, table, demo.ink_ruler, reader).accuracy > 1 - 1e-6


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
