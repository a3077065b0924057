"""Laws of learning from labels of a path's end against labels that might have come of its states."""

import pytest
import torch

from ctrl_diffusion.chain.paths import paths_with_states
from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import ComponentLabel, GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn import contrast as module
from ctrl_diffusion.learn.contrast import Contrast, LabelTable, State, contrast
from ctrl_diffusion.prior.network import as_denoiser
from ctrl_diffusion.reward.reward import Reward, prior_table

FLOW, TIMES = RectifiedFlow(), (0.9, 0.6, 0.3, 0.1)
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]])
WEIGHTS = torch.tensor([0.6, 0.3, 0.1])


def setting(controls=1, **options):
    """A mixture whose y is the component; labels are as frequent as their components."""
    prior = GaussianMixture(MEANS, 0.4, FLOW, WEIGHTS)
    names = [f"y{i}" for i in range(controls)]
    policy = Policy(prior, *(SideControl(name, "abc", prior, width=8, seed=i) for i, name in enumerate(names)))
    with torch.no_grad():
        for i, p in enumerate(policy.trainable()):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    classifiers = {name: ComponentLabel(prior) for name in names}
    conditions = Conditions({}, dict.fromkeys(names, 3), nullable=names if controls > 1 else (), **options)
    return policy, Reward(classifiers), conditions


def paths_of(prior, n=300):
    steps = torch.arange(len(TIMES) - 1).expand(n, -1)
    return paths_with_states(prior, steps, TIMES, torch.Generator().manual_seed(1))


def batch_of(n=40):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, n, 2, generator=generator)
    t = torch.tensor(TIMES, dtype=torch.float64)[torch.randint(3, (n,), generator=generator)]
    y, other = torch.randint(3, (2, n), generator=generator)
    return x[0], t, (y, other), State(x[1], x[2]), torch.rand(n, generator=generator) + 0.5


def test_a_label_that_hardly_any_path_ends_with_is_said():
    prior = GaussianMixture(MEANS, 0.4, FLOW, torch.tensor([0.7, 0.2999, 0.0001]))
    reward, conditions = Reward({"y": ComponentLabel(prior)}), Conditions({}, {"y": 3}, names={"y": "abc"})
    with pytest.warns(UserWarning, match=r"contrast learns from a handful of 300 prior samples: y = c \(\d\.\d hits\)"):
        LabelTable.from_paths(reward, conditions, paths_of(prior))


def test_the_loss_is_the_formula_of_the_docstring():
    policy, _, conditions = setting()
    x_t, t, (y, other), state, weight = batch_of()
    sigma = policy.schedule(t)[1].float()[:, None]
    d, d_other = ((policy(x_t, t, labels={"y0": label}) - state.x_hat) / sigma for label in (y, other))
    r = (state.x_0 - state.x_hat) / sigma
    expected = 0.5 * d.square().sum() - ((d - weight[:, None] * d_other) * r).sum()
    loss = contrast(policy, conditions, x_t, t, (y, other), state, weight, {})
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_network_is_not_asked_twice_where_both_labels_are_one(monkeypatch):
    policy, _, conditions = setting()
    x_t, t, (y, other), state, weight = batch_of()
    rows = []
    monkeypatch.setattr(policy, "forward", lambda x, *_, **__: rows.append(len(x)) or torch.zeros_like(x))
    contrast(policy, conditions, x_t, t, (y, other), state, weight, {})
    assert rows == [len(y) + int((y != other).sum())]
    assert int((y == other).sum()) > 5


def test_what_all_labels_share_is_not_learned(monkeypatch):
    """A shift of every r by b(x_t), the same for all labels, leaves the gradient as it is, on average.

    The outlook is the exact one; labels are not equally frequent. Without the terms of y' the shift is learned.
    """
    policy, reward, conditions = setting()
    times = FLOW.times(80, 0.05)
    steps = torch.arange(0, 80, 8).expand(4000, -1)
    drawn = paths_with_states(policy.base, steps, times, torch.Generator().manual_seed(1))

    def exact(reward, conditions, paths, log_p_end, gammas):
        tables = []
        for i, number in enumerate(paths.steps[0]):
            alpha, sigma = (float(a) for a in FLOW(times[number]))
            square = (paths.states[:, i, None] - alpha * MEANS).square().sum(2)
            tables.append((WEIGHTS.log() - square / (2 * ((0.4 * alpha) ** 2 + sigma**2))).softmax(1))
        return torch.stack(tables, 1)[None]

    monkeypatch.setattr(module, "outlook", exact)
    monkeypatch.setattr(module, "half_square", lambda d: 0 * d.sum(1))  # the part of the loss that r is in
    shifted = drawn._replace(x_hat=drawn.x_hat - torch.tensor([2.0, -1.0]))

    def gradients(paths):
        stream = Contrast(paths, times, 500)(policy, reward, conditions, torch.Generator().manual_seed(5))
        losses = [next(stream).loss for _ in range(40)]
        return torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.trainable())]) for loss in losses
        ])  # fmt: skip

    change = gradients(shifted) - gradients(drawn)  # by the same draws
    error = change.std(0).norm() / len(change) ** 0.5
    monkeypatch.setattr(LabelTable, "other", lambda self, cell, *_: (cell, torch.zeros(len(cell))))
    without = (gradients(shifted) - gradients(drawn)).mean(0).norm()
    # a chain's ends are not quite drawn from the exact outlook: of 20, 40 and 80 steps 0.044, 0.028, 0.009 are left
    assert float(change.mean(0).norm()) < 0.02 * float(without) + 3 * float(error)


def test_labels_are_drawn_evenly_and_others_as_the_state_allows():
    policy, reward, conditions = setting()
    drawn = paths_of(policy.base, 3000)
    table = LabelTable.from_paths(reward, conditions, drawn)
    n, generator = 30_000, torch.Generator().manual_seed(2)
    cell, column = torch.arange(n) % 3, torch.randint(3, (n,), generator=generator)
    quantile = torch.rand(2, n, 1, generator=generator, dtype=torch.float64)
    row = table.path(cell, quantile[0])
    # paths of a label are drawn by p̂ at their ends
    p = prior_table(reward, conditions, drawn.x_0)[0].exp()
    expected = (p.square().sum(0) / p.sum(0)).mean()
    # the standard error of a mean of numbers in [0, 1] is at most 0.5/√n = 0.003
    torch.testing.assert_close(p[row, cell].mean(), expected, rtol=0, atol=0.012)
    other, weight = table.other(cell, row, column, quantile[1])
    # weighted, states and the labels drawn at them are those of the prior: y' is as frequent as y, label by label
    shares = torch.stack([weight[other == y].sum() for y in range(3)]) / n
    torch.testing.assert_close(shares.float(), torch.full((3,), 1 / 3), rtol=0, atol=0.04)
    # early states say little of y, late ones nearly all
    same = [(other == cell)[column == k].double().mean() for k in range(3)]
    assert same[0] < 0.6 < 0.8 < same[2]


def test_with_several_controls_the_other_label_is_of_the_same_controls():
    policy, reward, conditions = setting(controls=2)
    table = LabelTable.from_paths(reward, conditions, paths_of(policy.base))
    n, generator = 3000, torch.Generator().manual_seed(2)
    cell = conditions.draw(n, generator)
    quantile = torch.rand(2, n, 1, generator=generator, dtype=torch.float64)
    row = table.path(cell, quantile[0])
    other, weight = table.other(cell, row, torch.zeros(n, dtype=torch.long), quantile[1])
    choice = conditions.choice
    assert bool((choice[cell] == choice[other]).all())
    assert bool(weight.isfinite().all() & (weight > 0).all())


def test_labels_of_some_controls_agree_with_those_of_all():
    policy, reward, conditions = setting(controls=2)
    agrees = LabelTable.from_paths(reward, conditions, paths_of(policy.base)).agrees
    assert agrees.shape == (9, 15)
    # a label of one control has the classes of three of all, one of both of a single one
    assert agrees.sum(0).tolist() == [1 if (y >= 0).all() else 3 for y in conditions.combinations]


def test_where_the_chain_clips_a_gradient_passes():
    """A pixel beyond the clip has a gradient inside; x̂ is clipped all the same."""
    network = as_denoiser(lambda x_t, timestep: 3 * x_t, FLOW, (2,))
    network.clip = 1.0
    x = torch.ones(4, 2, requires_grad=True)
    for inside, slope in ((network.straight_through(), 3.0), (network.frozen(), 0.0)):
        with inside:
            x_hat = network(x, 0.5)
        assert bool((x_hat == 1).all())
        (gradient,) = torch.autograd.grad(x_hat.sum(), x)
        assert bool((gradient == slope).all())


@pytest.mark.parametrize("gammas", [(), (1.0, 2.0)])
def test_a_path_keeps_its_own_label(gammas):
    """γ sharpens the weights of paths, and an outlook is fitted for each γ."""
    policy, reward, conditions = setting(gammas=gammas)
    reward = Reward({"y0": Logistic3()})
    table = LabelTable.from_paths(reward, conditions, paths_of(policy.base))
    assert len(table.outlooks) == max(1, len(gammas))
    assert table.weights.shape == (conditions.cells, 300)
    torch.testing.assert_close(table.weights.mean(1), torch.ones(conditions.cells, dtype=torch.float64))
    for outlook in table.outlooks:
        torch.testing.assert_close(outlook.sum(2), torch.ones(300, 3))
    if gammas:
        assert float(table.weights[3:].std()) > float(table.weights[:3].std())


class Logistic3:
    """Three soft classes along the first dimension."""

    def log_prob(self, x):
        return torch.stack([-x[:, 0], torch.zeros(len(x)), x[:, 0]], 1).log_softmax(1)
