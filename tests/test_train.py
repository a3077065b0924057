import pytest
import torch

from ctrl_diffusion.control import Policy, SideControl
from ctrl_diffusion.exact import GaussianMixture
from ctrl_diffusion.learn import Step
from ctrl_diffusion.schedule import Cosine
from ctrl_diffusion.train import fit

LR = {"embedding": 1e-2, "adapter": 1e-2}


def policy():
    prior = GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.3, Cosine())
    return Policy(prior, SideControl("y", ("a", "b"), prior, width=4))


def losses(policy):
    while True:
        x_hat = policy(torch.ones(2, 1), 0.5, labels={"y": torch.tensor([0, 1])})
        yield Step((x_hat - 3).square().mean(), {"seen": 1.0})


def test_fit_yields_every_update_lowers_the_loss_and_keeps_the_average():
    trained = policy()
    updates = list(fit(trained, losses(trained), 100, LR, ema_decay=0.9))
    assert [u.number for u in updates] == list(range(1, 101))
    assert updates[-1].loss < 0.1 * updates[0].loss
    assert updates[0].metrics == {"seen": 1.0}
    assert next(losses(trained)).loss < 0.1 * updates[0].loss


def test_one_seed_one_result():
    results = []
    for _ in range(2):
        trained = policy()
        list(fit(trained, losses(trained), 10, LR))
        results.append(torch.cat([p.flatten() for g in trained.parameter_groups().values() for p in g]))
    assert torch.equal(*results)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights():
    trained = policy()
    before = [p.clone() for p in trained.parameters()]
    with pytest.raises(FloatingPointError, match="loss of update 1"):
        list(fit(trained, iter([Step(torch.tensor(float("nan"), requires_grad=True))]), 1, LR))
    assert all(torch.equal(p, q) for p, q in zip(before, trained.parameters(), strict=True))
