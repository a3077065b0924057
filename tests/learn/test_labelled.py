import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.labelled import Labelled


def setting():
    prior = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.3, Cosine())
    controls = [SideControl(name, ("a", "b"), prior, width=8) for name in "yz"]
    return Policy(prior, *controls), Cosine().times(5, 0.1)


def test_the_loss_is_the_squared_error_of_x_hat_over_sigma():
    """At first the policy is the prior; noise so small that x̂ is x_0 but for the noise: ½ E‖ε‖² · (1 + …) ≈ D/2."""
    policy, _ = setting()
    x_0, times = policy.prior.sample(4000, torch.Generator().manual_seed(0)), (0.011, 0.01)
    labels = {"y": torch.zeros(4000, dtype=torch.long)}
    step = next(Labelled(x_0, labels, {}, times, batch=4000)(policy, None, None, torch.Generator().manual_seed(1)))
    # x̂ − x_0 = σ ε but for terms of σ²; the mean of 4,000 halves of χ² with 2 degrees has an error of 1/√4000
    assert abs(float(step.loss.detach()) - 1.0) < 4 / 4000**0.5 + 0.01


def test_labels_are_dropped_but_never_the_last():
    _, times = setting()
    n = 20_000
    y, z = torch.zeros(n, dtype=torch.long), torch.where(torch.arange(n) % 2 == 0, 1, NULL)
    learner = Labelled(torch.zeros(n, 2), {"y": y, "z": z}, {}, times, dropout=0.3)
    found = learner.drop_labels({"y": y, "z": z}, torch.Generator().manual_seed(0))
    both, alone = z != NULL, z == NULL
    assert (found["z"][alone] == NULL).all()  # what was never there
    assert (found["y"][alone] == 0).all()
    assert ((found["y"] != NULL) | (found["z"] != NULL)).all()
    # of rows with both, either is dropped with probability 0.3 · 0.7; 10,000 rows know that to 0.004
    for name in "yz":
        assert abs(float((found[name][both] == NULL).double().mean()) - 0.21) < 4 * 0.004


def test_datasets_of_different_controls_train_their_own():
    """Rows whose label of a control is null leave it as it is."""
    policy, times = setting()
    before = [p.detach().clone() for p in policy.controls["z"].parameters()]
    labels = {"y": torch.tensor([0, 1] * 50), "z": torch.full((100,), NULL)}
    x_0 = policy.prior.sample(100, torch.Generator().manual_seed(0))
    for micro in (None, 8):
        losses = Labelled(x_0, labels, {}, times, batch=32, micro=micro)(policy, None, None, torch.Generator())
        assert len(list(fit(policy, losses, 3, {"embedding": 1e-2, "adapter": 1e-2}))) == 3
    assert all(torch.equal(p, q) for p, q in zip(policy.controls["z"].parameters(), before, strict=True))
    assert policy.controls["y"].table.weight.abs().max() > 0
