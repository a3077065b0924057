from itertools import islice

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


def test_a_step_is_taken_after_its_last_part():
    """Parts in any number train as the whole does, and their figures add up."""
    whole, parted = policy(), policy()

    def in_parts(stream):
        for step in stream:
            for share, last in ((0.25, False), (0.5, False), (0.25, True)):
                graph = share * next(losses(parted)).loss
                yield Step(graph, {name: share * value for name, value in step.metrics.items()}, last)

    first, second = list(fit(whole, losses(whole), 20, LR)), list(fit(parted, in_parts(losses(parted)), 20, LR))
    assert [update.number for update in second] == list(range(1, 21))
    assert [u.loss for u in second] == pytest.approx([u.loss for u in first], rel=1e-4)
    assert second[0].metrics == {"seen": 1.0}
    torch.testing.assert_close(weights(parted), weights(whole), rtol=1e-3, atol=1e-5)


def test_what_half_precision_scales_up_on_the_way_back_is_scaled_down_again():
    """A power of two, so that the same numbers come out to the bit."""
    results = []
    for scale in (1.0, 1024.0):
        trained = policy()
        other = SideControl("z", ("a", "b"), trained.base, width=4)  # never asked for, so without a gradient
        trained = Policy(trained.base, *trained.controls.values(), other)
        trained.base.gradient_scale = scale
        list(fit(trained, losses(trained), 10, LR))
        results.append(weights(trained))
    assert torch.equal(*results)


def test_an_update_too_large_for_half_precision_is_left_out():
    """And the scale lowered, until there is none left to blame."""
    trained = policy()
    trained.base.gradient_scale = 2.0**10

    def too_large(scale):
        """Its gradient is infinite where the scale is above `scale`."""
        for step in losses(trained):
            bad = float("inf") if trained.gradient_scale > scale else 0.0
            trained.controls["y"].table.weight.register_hook(lambda g, bad=bad: g + bad)
            yield step

    before = weights(trained)
    updates = fit(trained, too_large(8.0), 5, LR)
    first, second = next(updates), next(updates)
    assert [u.gradient_norm for u in (first, second)] == [float("inf")] * 2
    assert torch.equal(weights(trained), before)
    assert trained.gradient_scale == 4.0


def test_a_stream_that_ends_ends_the_training():
    trained = policy()
    assert len(list(fit(trained, islice(losses(trained), 3), 10, LR))) == 3
