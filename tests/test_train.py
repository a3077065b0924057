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


def weights(policy):
    return torch.cat([p.detach().flatten() for group in policy.parameter_groups().values() for p in group])


def test_fit_yields_every_update_and_lowers_the_loss():
    trained = policy()
    updates = list(fit(trained, losses(trained), 100, LR, ema_decay=0.9))
    assert [u.number for u in updates] == list(range(1, 101))
    assert updates[-1].loss < 0.1 * updates[0].loss
    assert updates[0].metrics == {"seen": 1.0}
    assert next(losses(trained)).loss < 0.1 * updates[0].loss


def test_the_weights_left_behind_are_the_average():
    """The decay of the k-th average is min(ema_decay, 1 − (1 + k)^(−3/4)), k from 0: diffusers' warm-up, power 3/4."""
    trained, average = policy(), None
    for k, _ in enumerate(fit(trained, losses(trained), 30, LR, ema_decay=0.9)):
        decay = min(0.9, 1 - (1 + k) ** -0.75)
        average = weights(trained) if average is None else decay * average + (1 - decay) * weights(trained)
    assert not torch.allclose(average, weights(policy()), atol=1e-3)
    torch.testing.assert_close(weights(trained), average, rtol=1e-4, atol=1e-6)


def test_one_seed_one_result():
    results = []
    for _ in range(2):
        trained = policy()
        list(fit(trained, losses(trained), 10, LR))
        results.append(weights(trained))
    assert torch.equal(*results)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights():
    trained = policy()
    before = [p.clone() for p in trained.parameters()]
    with pytest.raises(FloatingPointError, match="loss of update 1"):
        list(fit(trained, iter([Step(torch.tensor(float("nan"), requires_grad=True))]), 1, LR))
    assert all(torch.equal(p, q) for p, q in zip(before, trained.parameters(), strict=True))
