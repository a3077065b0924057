import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ctrl_diffusion.chain.denoise import Denoiser
from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.ppo import PPO, Baseline, rewards_to_go, surrogate
from ctrl_diffusion.reward.reward import Reward
from ctrl_diffusion.reward.scorer import Estimator


class Shifted(Denoiser):
    """The prior with one learned shift of x̂ for each step and y."""

    def __init__(self, prior, times):
        super().__init__()
        self.base, self.schedule, self.shape = prior, prior.schedule, prior.shape
        self.theta = torch.nn.Parameter(0.2 * torch.ones(len(times), 2))
        self.times = torch.tensor(times)

    @property
    def prior(self):
        return self.base

    def forward(self, x_t, t, labels=None):
        place = (self.times - torch.as_tensor(t)[..., None]).abs().argmin(-1)
        return self.base(x_t, t) + self.theta[place, labels["y"]][:, None]


@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_before_the_first_update_the_gradient_is_that_of_j(schedule):
    """The score-function gradient against the pathwise one, parameter by parameter, over 40 batches each."""
    prior = GaussianMixture(torch.zeros(1, 1), 1.0, schedule)
    times = schedule.times(4, 0.2)
    policy, conditions = Shifted(prior, times), Conditions({}, {"y": 2})

    def reward(x_0, labels, cond):
        return torch.sin(x_0.squeeze(1)) * (1 + labels["y"])

    means, errors = [], []
    learners = PPO(times, batch=4000, surrogates=4, reuse=1), Backprop(times, batch=400, clip=float("inf"))
    for learner in learners:
        steps, found = learner(policy, reward, conditions, torch.Generator().manual_seed(0)), []
        for _ in range(40):
            (gradient,) = torch.autograd.grad(next(steps).loss, policy.theta)
            found.append(gradient[:-1].flatten())  # no step begins at the last time
        found = torch.stack(found)
        means.append(found.mean(0))
        errors.append(found.std(0) / 40**0.5)
    assert (means[1].abs() > 0.01).sum() >= 6, "there is a gradient to find"
    assert ((means[0] - means[1]).abs() < 4.5 * torch.hypot(*errors)).all()


def test_rewards_to_go_count_this_step_and_those_after_it():
    prior = GaussianMixture(torch.zeros(1, 1), 1.0, Cosine())
    times = Cosine().times(3, 0.2)
    labels, earned = {"y": torch.tensor([0, 1])}, torch.tensor([1.0, -2.0])
    with torch.no_grad():
        path = rollout(
            Shifted(prior, times), torch.randn(2, 1), times, generator=torch.Generator().manual_seed(0), compare=True,
            labels=labels,
        )  # fmt: skip
    found = rewards_to_go(path, earned)
    for i in range(3):
        torch.testing.assert_close(found[i], earned - sum(path.log_ratio[i:]))


def test_the_surrogate_is_clipped_on_the_side_that_helps():
    log_rho = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0]).requires_grad_()
    a = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
    worth = surrogate(log_rho, a, 0.2)
    rho = log_rho.detach().exp()
    torch.testing.assert_close(
        worth.detach(), torch.stack([a[0] * 1.2, a[1] * rho[1], a[2] * rho[2], a[3] * 0.8, a[4]])
    )
    (gradient,) = torch.autograd.grad(worth.sum(), log_rho)
    assert gradient[[0, 3]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gradient[[1, 2, 4]], (a * rho)[[1, 2, 4]])


def test_the_baseline_is_of_step_and_pair():
    baseline, pair = Baseline(momentum=0.5), torch.tensor([0, 0, 2])
    g = torch.tensor([[1.0, 3.0, 5.0], [0.0, 2.0, 4.0]])
    torch.testing.assert_close(
        baseline.advantages(g, pair, 3), torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]])
    )  # the first paths' own mean
    later = baseline.advantages(torch.full((2, 3), 6.0), torch.tensor([0, 1, 2]), 3)
    torch.testing.assert_close(later, torch.tensor([[4.0, 0.0, 1.0], [5.0, 0.0, 2.0]]))
    # half-way from 2 to 6, and a pair met once keeps its mean
    torch.testing.assert_close(baseline.mean, torch.tensor([[4.0, 6.0, 5.5], [3.5, 6.0, 5.0]]))


def test_a_classifier_without_gradient_will_do():
    """scikit-learn's own, through `predict_proba`; learners that follow a gradient say that there is none."""
    torch.manual_seed(0)
    prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.5, RectifiedFlow())
    x = prior.sample(500, torch.Generator().manual_seed(0))
    estimator = LogisticRegression().fit(x.numpy(), (x[:, 0] > 0.5).long().numpy())
    reward, conditions = Reward({"y": Estimator(estimator, 2)}), Conditions({}, {"y": 2})
    policy, times = Policy(prior, SideControl("y", ("a", "b"), prior)), RectifiedFlow().times(15, 0.1)
    y = {"y": torch.tensor([0, 1]).repeat(1000)}

    def j():
        x_0, _, log_ratio = paths(policy, 2000, times, torch.Generator().manual_seed(1), labels=y, compare=True)
        return float((reward(x_0, y) - log_ratio).mean())

    for other in (Adjoint(times, batch=4), Backprop(times, batch=4)):
        with pytest.raises(ValueError, match="no gradient"):
            next(other(policy, reward, conditions, torch.Generator().manual_seed(0)))
    before = j()
    learner = PPO(times, batch=256)
    for _ in fit(
        policy, learner(policy, reward, conditions, torch.Generator().manual_seed(0)), 300,
        {"embedding": 5e-3, "adapter": 3e-3},
    ):  # fmt: skip
        pass
    x_prior = paths(prior, 8000, times, torch.Generator().manual_seed(2)).x_0
    table = torch.stack([reward(x_prior, {"y": torch.full((8000,), k)}) for k in (0, 1)])
    log_z = float(table.exp().mean(1).log().mean())
    # it closes four fifths of what there is to close; the floor of 15 steps is some hundredths of a nat
    assert log_z - j() < 0.2 * (log_z - before)


def test_a_chain_without_noise_is_refused():
    for learner in (PPO, Adjoint, Backprop):
        with pytest.raises(ValueError, match="needs noise"):
            learner((1.0, 0.5), eta=0.0)
