import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.exact.mixtures import Logistic
from ctrl_diffusion.reward.reward import Reward, prior_table
from ctrl_diffusion.reward.scorer import Estimator

CONDITIONS = Conditions({"c": torch.arange(2)}, {"side": 2, "height": 2})
LIKELIHOODS = {"side": Logistic(torch.tensor([1.0, 0.0])), "height": Logistic(torch.tensor([0.0, 1.0]), 0.3)}


def test_the_table_has_the_reward_of_every_y_of_several_controls():
    reward, x = Reward(LIKELIHOODS, 0.7), torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    table = prior_table(reward, CONDITIONS, x)
    assert table.shape == (2, 5, 4)
    for pair in range(CONDITIONS.pairs):
        labels, cond = CONDITIONS.of(torch.full((5,), pair))
        g = int(cond["c"][0])
        torch.testing.assert_close(table[g, :, pair % 4], reward(x.view(2, 5, 2)[g], labels))


class Broken:
    def __init__(self, value):
        self.value = value

    def log_prob(self, x):
        out = torch.zeros(len(x), 2)
        out[3, 1] = self.value
        return out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match=r"'side' is not finite .* for class 1 on 1 of 10"):
        prior_table(Reward({"side": Broken(value)}), Conditions({}, {"side": 2}), torch.zeros(10, 2))


def test_an_estimator_answers_with_its_probabilities():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 4))
    fitted = LogisticRegression().fit(rows, (rows[:, 0] > 0).astype(int) + (rows[:, 1] > 0))
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    found = Estimator(fitted, 3, smallest=1e-12).log_prob(x)
    torch.testing.assert_close(found.exp(), torch.from_numpy(fitted.predict_proba(x.flatten(1).numpy())).float())
    sure = Estimator(LogisticRegression(C=1e6).fit(rows, (rows[:, 0] > 0).astype(int)), 2)
    assert float(sure.log_prob(1000 * x).min()) == pytest.approx(np.log(1e-4), abs=1e-3)


def test_an_estimator_that_cannot_serve_is_refused():
    rows = np.random.default_rng(0).normal(size=(60, 4))
    fitted = LogisticRegression().fit(rows, 2 * (rows[:, 0] > 0).astype(int))
    with pytest.raises(ValueError, match=r"fitted on the classes .*; needed: 0 … 2"):
        Estimator(fitted, 3)
    with pytest.raises(ValueError, match="needed: 0 … 1"):
        Estimator(LogisticRegression().fit(rows, np.arange(60) % 3), 2)
    with pytest.raises(ValueError, match="int has no predict_proba"):
        Estimator(3, 3)


class Signed:
    """p(y | x, c) that turns around with c: log-odds of y = 1 are x for c = 0 and −x for c = 1."""

    conditional = True

    def log_prob(self, x, c):
        odds = x * (1 - 2 * c[:, None])
        return torch.nn.functional.logsigmoid(torch.cat([-odds, odds], dim=1))


def test_a_likelihood_may_depend_on_the_condition():
    reward, conditions = Reward({"y": Signed()}), Conditions({"c": torch.tensor([0, 1])}, {"y": 2})
    x = torch.linspace(-3, 3, 1200)[:, None]  # more than is asked for at once
    table = prior_table(reward, conditions, torch.cat([x, x]))
    torch.testing.assert_close(table[0], table[1].flip(1))
    for pair in range(4):
        labels, cond = conditions.of(torch.full((len(x),), pair))
        torch.testing.assert_close(reward(x, labels, cond), table[pair // 2, :, pair % 2])


class OnScale:
    """p(y | x) normal about x."""

    def log_prob(self, x):
        return torch.distributions.Normal(x, 1.0).log_prob(torch.arange(3.0))

    def log_prob_at(self, x, y):
        return torch.distributions.Normal(x[:, 0], 1.0).log_prob(y)


def test_a_place_on_a_scale_earns_its_density():
    reward, x = Reward({"y": OnScale()}, 0.5), torch.tensor([[0.3], [1.0], [2.0]])
    found = reward(x, {"y": torch.tensor([0.5, 2.0, -1.0])})
    expected = 0.5 * torch.distributions.Normal(x[:2, 0], 1.0).log_prob(torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(found, torch.tensor([*expected, 0.0]))
    torch.testing.assert_close(reward(x, {"y": torch.full((3,), 2.0)}), reward(x, {"y": torch.full((3,), 2)}))


@pytest.mark.parametrize(("bound", "y", "sum_of_bounds"), [(0.5, 1.0, 0.5), (-0.3, 1.0, -0.3), (-0.3, NULL, 0.0)])
def test_the_bound_of_a_reward_is_that_of_its_densities(bound, y, sum_of_bounds):
    """γ times the sum over controls: 0 of classes, and a null label earns 0 itself."""

    class Density:
        def __init__(self):
            self.bound = bound

    reward = Reward({"class": Logistic(torch.ones(1)), "scale": Density()}, gamma=2.0)
    labels = {"class": torch.tensor([0, 1]), "scale": torch.tensor([0.0, y])}
    assert reward.bound(labels) == pytest.approx(2.0 * sum_of_bounds)
    assert reward.bound({"class": torch.tensor([0])}) == 0.0
