"""The outlook predicts the label of a path's end from p̂ of x̂, on paths it was not fitted to."""

import torch

from ctrl_diffusion.chain.paths import paths_with_states
from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture
from ctrl_diffusion.reward.outlook import features_of, outlook, predicted
from ctrl_diffusion.reward.reward import Reward, prior_table

FLOW = RectifiedFlow()


def test_what_says_nothing_of_the_label_predicts_its_frequency():
    n, generator = 2000, torch.Generator().manual_seed(0)
    log_p, p_end = torch.randn(n, 3, generator=generator).log_softmax(1), torch.tensor([[0.6, 0.3, 0.1]]).expand(n, -1)
    q = predicted(features_of(log_p, torch.zeros(n, dtype=torch.long)), p_end, generator).exp()
    # 1,500 rows fit four numbers a class: the standard error of a frequency is 0.013, and as much for each slope
    torch.testing.assert_close(q.mean(0).float(), p_end[0], rtol=0, atol=0.03)
    assert float(q.std(0).max()) < 0.05


def test_a_label_that_the_state_decides_is_predicted():
    n, generator = 400, torch.Generator().manual_seed(0)
    p_end = torch.eye(2)[torch.arange(n) % 2]
    q = predicted(features_of((0.8 * p_end + 0.1).log(), torch.zeros(n, dtype=torch.long)), p_end, generator)
    assert float((q.exp() * p_end).sum(1).min()) > 0.9


def test_a_condition_is_part_of_what_is_predicted_from():
    n, generator = 1000, torch.Generator().manual_seed(0)
    group = torch.arange(n) % 2
    p_end = torch.tensor([[0.9, 0.1], [0.1, 0.9]])[group]
    q = predicted(features_of(torch.zeros(n, 2), group), p_end, generator).exp()
    assert float((q - p_end).abs().max()) < 0.1


def test_labels_that_all_paths_share_leave_nothing_to_predict():
    p_end = torch.tensor([[1.0, 0.0]]).expand(8, -1)
    q = predicted(features_of(torch.zeros(8, 2), torch.zeros(8, dtype=torch.long)), p_end, torch.Generator())
    assert bool((q == q[0, 0]).all())


def test_it_is_nearly_the_posterior_of_a_mixture():
    """Of two components far apart the outlook at x_t is known; the regression comes within 0.02 nat of it."""
    means, weights = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.3, 0.7])
    prior, times = GaussianMixture(means, 0.3, FLOW, weights), FLOW.times(40, 0.05)
    steps = torch.tensor([4, 10, 16]).expand(3000, -1)
    drawn = paths_with_states(prior, steps, times, torch.Generator().manual_seed(0))
    reward, conditions = Reward({"y": ComponentLabel(prior)}), Conditions({}, {"y": 2})
    (q,) = outlook(reward, conditions, drawn, prior_table(reward, conditions, drawn.x_0)[0], [1.0])
    torch.testing.assert_close(q.sum(2), torch.ones(3000, 3))
    y = reward.table("y", drawn.x_0).argmax(1)
    for column, number in enumerate(steps[0]):
        alpha, sigma = (float(a) for a in FLOW(times[number]))
        square = (drawn.states[:, column, None] - alpha * means).square().sum(2)
        exact = (weights.log() - square / (2 * ((0.3 * alpha) ** 2 + sigma**2))).log_softmax(1)
        loss = [-table[torch.arange(3000), y].mean() for table in (q[:, column].log(), exact)]
        assert float(loss[0] - loss[1]) < 0.02
