"""A side control under a continuous c."""

import pytest
import torch

from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.exact.population import COORDINATES, Population
from ctrl_diffusion.exact.side_control import SideControl

TASK = Population("flow", "logistic")


def perturbed():
    prior = TASK.prior()
    control = SideControl("side", ("left", "right"), prior, coordinates=COORDINATES, width=8)
    with torch.no_grad():
        for i, p in enumerate(control.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return Policy(prior, control)


def test_what_it_does_depends_on_c_and_a_null_label_is_the_prior():
    policy, x_t, c = perturbed(), torch.zeros(4, 2), torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.5, 0.5]])
    y = torch.tensor([0, 0, 0, NULL])
    with torch.no_grad():
        effect = policy(x_t, 0.5, labels={"side": y}, c=c) - policy.prior(x_t, 0.5, c=c)
    assert torch.equal(effect[3], torch.zeros(2))
    assert len(effect[:3].unique(dim=0)) == 3
    # smooth: c is read by a linear layer, so a c between two others has an effect near theirs
    with torch.no_grad():
        near = policy(x_t, 0.5, labels={"side": y}, c=c + 1e-3) - policy.prior(x_t, 0.5, c=c + 1e-3)
    assert 0 < float((near - effect)[:3].abs().max()) < 0.01 * float(effect.abs().max())


def test_it_is_saved_and_loaded(tmp_path):
    policy, c = perturbed(), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    policy.controls["side"].save(tmp_path)
    prior = TASK.prior()
    loaded = Policy(prior, SideControl.load(tmp_path, prior))
    x_t, labels = torch.ones(4, 2), {"side": torch.tensor([0, 1, 1, 0])}
    with torch.no_grad():
        assert torch.equal(loaded(x_t, 0.3, labels=labels, c=c), policy(x_t, 0.3, labels=labels, c=c))


def test_a_c_that_is_numbered_and_continuous_is_refused():
    with pytest.raises(ValueError, match="3 conditions and 2 coordinates"):
        SideControl("side", ("left", "right"), TASK.prior(), conditions=3, coordinates=2)
