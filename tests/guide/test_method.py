"""Laws of every baseline."""

from collections import Counter

import pytest
import torch

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.exact.mixtures import GaussianMixture, Logistic
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.guide.classifier_guidance import ClassifierGuidance
from ctrl_diffusion.guide.free_guidance import FreeGuidance
from ctrl_diffusion.guide.particles import TDS, FeynmanKac
from ctrl_diffusion.guide.reconstruction import DPS, MPGD
from ctrl_diffusion.guide.selection import BestOf, Importance, Rejection
from ctrl_diffusion.prior.network import as_denoiser
from ctrl_diffusion.reward.reward import Reward

STEPS, K, B = 5, 4, 6


class Noisy:
    """Any function of x_t and t."""

    def log_prob(self, x_t, t):
        return Logistic(torch.tensor([1.0, -0.5]), steepness=1 - 0.5 * t).log_prob(x_t)


METHODS = {
    "classifier guidance": ClassifierGuidance({"y": Noisy()}),
    "free guidance": FreeGuidance(),
    "DPS": DPS(),
    "MPGD": MPGD(),
    "TDS": TDS(particles=K),
    "Feynman-Kac": FeynmanKac(particles=K),
    "Feynman-Kac, max": FeynmanKac(particles=K, potential="max"),
    "importance": Importance(particles=K),
    "best of n": BestOf(n=K),
    "rejection": Rejection(),
}
# evaluations of prior and reward for each sample, gradients through prior and reward; N steps and the read-out
N = STEPS
COSTS = {
    "classifier guidance": (N + 1, N, 0, N),
    "free guidance": (2 * N + 1, 0, 0, 0),  # x̂_null and x̂_y
    "DPS": (N + 1, N, N, N),
    "MPGD": (N + 1, N, 0, N),
    "TDS": (K * (N + 1), K * (N + 1), K * N, K * N),
    "Feynman-Kac": (K * (N + 1), K * (N + 1), 0, 0),
    "Feynman-Kac, max": (K * (N + 1), K * (N + 1), 0, 0),
    "importance": (K * (N + 1), K, 0, 0),
    "best of n": (K * (N + 1), K, 0, 0),
}


def trained(prior):
    """A policy that does something."""
    control = SideControl("y", ("a", "b"), prior, width=8)
    with torch.no_grad():
        for i, parameter in enumerate(control.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return Policy(prior, control)


def setting(schedule):
    prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3, schedule)
    reward = Reward({"y": Logistic(torch.tensor([1.0, -0.5]))})
    return trained(prior), reward, {"y": torch.tensor([0, 1, 1, 0, NULL, 1])}, schedule.times(STEPS, 0.1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_at_strength_0_it_is_the_prior_bit_for_bit(schedule, name):
    policy, reward, labels, times = setting(schedule)
    found = METHODS[name](policy, reward, labels, None, times, torch.Generator().manual_seed(0), strength=0.0)
    prior = paths(policy.prior, B, times, torch.Generator().manual_seed(0)).x_0
    assert torch.equal(found.x_0, prior)
    assert found.cost.network_evaluations == STEPS + 1
    assert found.cost.classifier_evaluations == 0


@pytest.mark.parametrize("name", ["classifier guidance", "free guidance", "DPS", "MPGD"])
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_a_row_whose_label_is_null_is_the_priors(schedule, name):
    policy, reward, labels, times = setting(schedule)
    found = METHODS[name](policy, reward, labels, None, times, torch.Generator().manual_seed(0), strength=2.0)
    prior = paths(policy.prior, B, times, torch.Generator().manual_seed(0)).x_0
    asked = labels["y"] != NULL
    torch.testing.assert_close(found.x_0[~asked], prior[~asked])
    assert (found.x_0[asked] - prior[asked]).abs().min() > 1e-4


@pytest.mark.parametrize("name", [name for name in METHODS if name != "free guidance"])  # it would have to be trained
@pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow()])
def test_rows_get_what_they_ask_for_in_their_place(schedule, name):
    policy, reward, _, times = setting(schedule)
    y = torch.arange(400) % 2
    found = METHODS[name](policy.prior, reward, {"y": y}, None, times, torch.Generator().manual_seed(0))
    again = METHODS[name](policy.prior, reward, {"y": y}, None, times, torch.Generator().manual_seed(0))
    assert torch.equal(found.x_0, again.x_0)
    earned = reward(found.x_0, {"y": y}).exp().mean()
    refused = reward(found.x_0, {"y": 1 - y}).exp().mean()
    # p̂ of the prior's samples is 0.5 on average: what the poorest method makes of it must be far from that, 400 samples
    # know it to 0.02
    assert earned > 0.7
    assert refused < 0.3


class Counted(torch.autograd.Function):
    """The identity, which counts rows on both ways by the names of `Cost`."""

    @staticmethod
    def forward(ctx, x, rows, forward, backward):
        ctx.rows, ctx.name = rows, backward
        rows[forward] += len(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.rows[ctx.name] += len(grad)
        return grad, None, None, None


class Counting(Logistic):
    """A likelihood, noise-aware or not, that counts."""

    def __init__(self, rows):
        super().__init__(torch.tensor([1.0, -0.5]))
        self.rows = rows

    def log_prob(self, x, t=None):
        return super().log_prob(Counted.apply(x, self.rows, "classifier_evaluations", "classifier_gradients"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch", [None, 4])
def test_the_counts_are_those_made(name, batch):
    rows = Counter()
    weight = 0.4 * torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    network = ("network_evaluations", "gradient_evaluations")
    prior = as_denoiser(lambda x, timestep: torch.tanh(Counted.apply(x, rows, *network) @ weight), Cosine(), (2,))
    likelihood = Counting(rows)
    method = ClassifierGuidance({"y": likelihood}) if name == "classifier guidance" else METHODS[name]
    denoiser = trained(prior) if name == "free guidance" else prior
    labels, reward = {"y": torch.tensor([0, 1, 1, 0, 0, 1])}, Reward({"y": likelihood})
    method = type(method)(**{**vars(method), "batch": batch})
    times = Cosine().times(STEPS, 0.1)
    cost = method(denoiser, reward, labels, None, times, torch.Generator().manual_seed(0), strength=1.5).cost
    assert vars(cost) == {kind: rows[kind] / B for kind in vars(cost)}
    if name in COSTS:
        assert tuple(vars(cost).values()) == COSTS[name]
    else:
        assert cost.network_evaluations == (STEPS + 1) * cost.classifier_evaluations >= STEPS + 1


def test_free_guidance_at_strength_1_looks_once():
    policy, reward, _, times = setting(Cosine())
    labels = {"y": torch.zeros(B, dtype=torch.long)}
    assert FreeGuidance()(policy, reward, labels, None, times, torch.Generator()).cost.network_evaluations == STEPS + 1


@pytest.mark.parametrize("name", ["DPS", "MPGD", "TDS", "classifier guidance"])
def test_a_reward_without_a_gradient_is_refused(name):
    class Table:
        def log_prob(self, x, t=None):
            return torch.zeros(len(x), 2)

    policy, _, labels, times = setting(Cosine())
    method = ClassifierGuidance({"y": Table()}) if name == "classifier guidance" else METHODS[name]
    with pytest.raises(ValueError, match="no gradient"):
        method(policy.prior, Reward({"y": Table()}), labels, None, times, torch.Generator())


def test_a_guided_denoiser_has_a_certificate_as_a_policy_has():
    """log Z ≥ J for whatever guides: `steered` goes through `paths` with its KL."""
    policy, reward, _, times = setting(Cosine())
    labels = {"y": torch.ones(1000, dtype=torch.long)}
    guided = DPS().steered(policy.prior, reward)
    x_0, kl, log_ratio = paths(guided, 1000, times, torch.Generator().manual_seed(0), labels=labels, compare=True)
    assert kl.min() > 0
    # both estimate KL(P_g ‖ P_pre); they differ by a martingale of variance 2 KL
    assert float((log_ratio - kl).mean().abs()) < 5 * float((2 * kl.mean() / 1000).sqrt())
    prior = paths(policy.prior, 1000, times, torch.Generator().manual_seed(1)).x_0
    log_z = reward(prior, labels).exp().mean().log()
    assert float((reward(x_0, labels) - kl).mean()) < float(log_z)
