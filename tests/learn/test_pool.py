"""A pool that all conditions share teaches what samples of each condition teach, in closed form.

Under one Gaussian and a linear-Gaussian y, or two Gaussians of which y is the number, E[x_0 | x_t, c, y] is affine in
x_t for each (c, y). So a learner's own loss, on one large batch, has its minimum among affine functions of each (c, y)
by a linear system: no training, no network.
"""

import warnings

import pytest
import torch

from ctrl_diffusion.chain.denoise import Denoiser
from ctrl_diffusion.chain.paths import PriorPaths
from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.exact.mixtures import ComponentLabel, LinearGaussian
from ctrl_diffusion.exact.moving import MovingMixture, moving_log_z, moving_posterior
from ctrl_diffusion.learn.contrast import Contrast
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.reward.reward import Reward

DOUBLE, TIMES, STD = torch.float64, (0.5, 0.1), 0.5  # a chain of one step
PLACES = torch.tensor([[-1.2], [0.0], [1.2]], dtype=DOUBLE)  # c
MEASURED = LinearGaussian(torch.ones(1, dtype=DOUBLE), torch.tensor([-1.0, 1.0], dtype=DOUBLE), 0.6)
RARE = (0, 1)  # the second y under the first c
POOLS, MEMBERS, BATCH = 12, 2000, 2**12  # samples for each c


def column(*values):
    return torch.tensor(values, dtype=DOUBLE)[:, None]


# c moves the one Gaussian to where a y is not; of the two it makes one rare
PRIORS = {
    "linear-Gaussian": MovingMixture(column(0.0), STD, RectifiedFlow(), column(1.0), column(0.0)),
    "component": MovingMixture(column(-0.8, 0.8), STD, RectifiedFlow(), column(0.5), column(-1.65, 1.65)),
}
LIKELIHOODS = {"linear-Gaussian": MEASURED, "component": ComponentLabel(PRIORS["component"], conditional=True)}


def posteriors(kind, gamma):
    """p(x | c, y) of each y: a Gaussian that moves with c."""
    if kind == "linear-Gaussian":
        return [moving_posterior(PRIORS[kind], MEASURED, y, gamma) for y in range(2)]
    return [MovingMixture(mean[None], STD, RectifiedFlow(), column(0.5), column(0.0)) for mean in PRIORS[kind].means]


class Affine(Denoiser):
    """x̂ = a + b x_t, with a and b of each (c, y): (G, K, 2)."""

    def __init__(self):
        super().__init__()
        self.schedule, self.shape = RectifiedFlow(), (1,)
        self.table = torch.nn.Parameter(torch.zeros(len(PLACES), 2, 2, dtype=DOUBLE))

    def forward(self, x_t, t, labels, c):
        a, b = self.table[(c == PLACES.mT).int().argmax(1), labels["y"]].unbind(1)
        return a[:, None] + b[:, None] * x_t


def conditions_of(pooled):
    return Conditions({"c": PLACES}, {"y": 2}, pooled=pooled)


def learner_on(name, prior, x_0, generator):
    """The learner on samples x_0, which are those of each c in turn and of the pool alike."""
    if name == "weighted":
        return Weighted(x_0, TIMES, BATCH)
    c = PLACES.repeat_interleave(MEMBERS, 0)
    alpha, sigma = prior.schedule(TIMES[0])
    x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=generator, dtype=DOUBLE)
    x_hat, steps = prior(x_t, TIMES[0], c=c), torch.zeros(len(x_0), 1, dtype=torch.long)
    return Contrast(PriorPaths(x_0, steps, x_t[:, None], x_hat[:, None]), TIMES, BATCH)


def least(name, kind, pooled, gamma, seed):
    """The table at which the loss of one batch is least, by its gradient and Hessian at 0."""
    generator, prior, policy = torch.Generator().manual_seed(seed), PRIORS[kind], Affine()
    x_0 = prior.sample(3 * MEMBERS, generator, PLACES.repeat_interleave(MEMBERS, 0))
    learner, reward = learner_on(name, prior, x_0, generator), Reward({"y": LIKELIHOODS[kind]}, gamma)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few samples have the rare y
        loss = next(learner(policy, reward, conditions_of(pooled), generator)).loss
    (gradient,) = torch.autograd.grad(loss, policy.table, create_graph=True)
    # no two (c, y) share a term: the rows of each one's Hessian come of the sums over all
    hessian = [torch.autograd.grad(column.sum(), policy.table, retain_graph=True)[0] for column in gradient.unbind(2)]
    return -torch.linalg.solve(torch.stack(hessian, dim=2), gradient.detach())


def exact(kind, gamma):
    """E[x_0 | x_t, c, y] as such a table; and E[x_0 | c, y] (G, K)."""
    tables, means = [], []
    for tilted in posteriors(kind, gamma):
        at_0, at_1 = (tilted(x + torch.zeros(3, 1, dtype=DOUBLE), TIMES[0], c=PLACES) for x in (0.0, 1.0))
        tables.append(torch.cat([at_0, at_1 - at_0], dim=1))
        means.append((tilted.means + PLACES @ tilted.move.mT).squeeze(1))
    return torch.stack(tables, dim=1), torch.stack(means, dim=1)


def where_it_matters(table, mean):
    """x̂ (…, G, K) at the x_t in the middle of each (c, y), one of its standard deviations below, and above."""
    alpha, sigma = (float(a) for a in RectifiedFlow()(TIMES[0]))
    middle, spread = alpha * mean, (alpha**2 * STD**2 + sigma**2) ** 0.5
    return torch.stack([table[..., 0] + table[..., 1] * (middle + z * spread) for z in (-1, 0, 1)])


def test_one_y_is_rare_under_one_c():
    """The law below is about it: one in fifty of the samples of that c has it."""
    by_place = moving_log_z(PRIORS["linear-Gaussian"], MEASURED, PLACES).softmax(1)
    by_number = PRIORS["component"].log_weights(PLACES, 3).exp()
    assert 0.01 < float(by_place[RARE]) < 0.03
    assert 0.01 < float(by_number[RARE]) < 0.03


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "enumerated"])
@pytest.mark.parametrize(
    ("name", "kind", "gamma"),
    [
        ("weighted", "linear-Gaussian", 1.0),
        ("weighted", "linear-Gaussian", 0.5),
        ("weighted", "component", 1.0),
        ("contrast", "component", 1.0),
    ],
)
def test_the_solution_is_the_conditional_denoiser_however_often_a_pair_comes(name, kind, gamma, pooled):
    """Of 18 deviations by the spread of 12 pools none is beyond 4.5 errors: by chance (t of 11) one run in 60.

    Few samples stand behind the rare pair, n = 40 hits of each pool: regression on weights is biased by order 1/n, an
    error of 12 pools is of order 1/√(12 n), and so a bias of half an error is part of the tolerance.
    """
    table, mean = exact(kind, gamma)
    tables = torch.stack([least(name, kind, pooled, gamma, seed) for seed in range(POOLS)])
    solved, expected = where_it_matters(tables, mean), where_it_matters(table, mean)
    error = solved.std(1) / POOLS**0.5
    assert float(((solved.mean(1) - expected).abs() / error).max()) < 4.5
    # and that says something: the two y are more than ten errors apart, the rare one's too
    assert float(error.max()) < 0.1 * float((expected[..., 1] - expected[..., 0]).min())
