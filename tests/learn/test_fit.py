import math
from itertools import islice

import pytest
import torch

from ctrl_diffusion.chain.schedule import Cosine
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.exact.mixtures import GaussianMixture
from ctrl_diffusion.exact.side_control import SideControl
from ctrl_diffusion.learn.fit import cosine, fit
from ctrl_diffusion.learn.step import Step

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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_left_out_and_counted(value):
    trained, seen = policy(), []

    def now_and_then():
        for number, step in enumerate(losses(trained), start=1):
            yield Step(step.loss * value if number in (3, 4, 7) else step.loss)

    for update in fit(trained, now_and_then(), 8, LR, max_skipped=2):
        seen.append((update.skipped, weights(trained)))
    assert [skipped for skipped, _ in seen] == [0, 0, 1, 2, 2, 2, 3, 3]
    same = [torch.equal(before, after) for (_, before), (_, after) in zip(seen, seen[1:-1], strict=False)]
    assert same == [False, True, True, False, False, True], "the last ones are averaged"


def test_too_many_losses_in_turn_that_are_not_finite_stop_before_they_spoil_the_weights():
    trained = policy()
    before = [p.clone() for p in trained.parameters()]
    bad = Step(torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(FloatingPointError, match="loss of update 1 is nan. Lower the learning rate"):
        list(fit(trained, iter([bad]), 1, LR, max_skipped=0))
    with pytest.raises(FloatingPointError, match="loss of update 3 is nan, as in 2 batches before it"):
        list(fit(trained, iter([bad] * 9), 9, LR, max_skipped=2))
    assert all(torch.equal(p, q) for p, q in zip(before, trained.parameters(), strict=True))


def test_paths_that_serve_several_updates_count_once():
    trained, good = policy(), next(losses(policy()))
    bad = [Step(torch.tensor(float("inf"), requires_grad=True), whole=number % 4 == 0) for number in range(1, 13)]
    assert [u.skipped for u in fit(trained, iter([*bad[:8], good]), 9, LR, max_skipped=2)][-1] == 8
    with pytest.raises(FloatingPointError, match="loss of update 12 is inf, as in 2 batches"):
        list(fit(trained, iter(bad), 12, LR, max_skipped=2))


def test_a_training_goes_on_from_a_state_to_the_bit():
    """Of weights, averages, moments and the place in the learning rate's course; also where an update was left out."""
    whole, first, second = policy(), policy(), policy()

    def stream(trained, start=1):
        for number, step in enumerate(losses(trained), start=start):
            bad = float("nan") if number == 3 else 1.0
            yield Step(step.loss * bad, whole=number % 2 == 1)

    undisturbed = list(fit(whole, stream(whole), 12, LR))
    updates = fit(first, stream(first), 12, LR)
    states = [(update := next(updates)).state and update.state() for _ in range(6)]
    assert [state is None for state in states] == [False, True] * 3, "in the middle of a batch there is none"
    resumed = list(fit(second, stream(second, 6), 12, LR, begin=states[4]))
    assert [(u.number, u.loss, u.skipped) for u in resumed] == [(u.number, u.loss, u.skipped) for u in undisturbed[5:]]
    assert torch.equal(weights(second), weights(whole))


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
        trained.base.loss_scale = scale
        list(fit(trained, losses(trained), 10, LR))
        results.append(weights(trained))
    assert torch.equal(*results)


def test_an_update_too_large_for_half_precision_is_left_out():
    """And the scale lowered, until there is none left to blame."""
    trained = policy()
    trained.base.loss_scale = 2.0**10

    def too_large(scale):
        """Its gradient is infinite where the scale is above `scale`."""
        for step in losses(trained):
            bad = float("inf") if trained.base.loss_scale > scale else 0.0
            trained.controls["y"].table.weight.register_hook(lambda g, bad=bad: g + bad)
            yield step

    before = weights(trained)
    updates = fit(trained, too_large(8.0), 5, LR)
    first, second = next(updates), next(updates)
    assert [u.gradient_norm for u in (first, second)] == [float("inf")] * 2
    assert torch.equal(weights(trained), before)
    assert trained.base.loss_scale == 4.0


def test_a_stream_that_ends_ends_the_training():
    trained = policy()
    assert len(list(fit(trained, islice(losses(trained), 3), 10, LR))) == 3


def test_a_share_of_the_rate_makes_a_step_as_much_shorter():
    """AdamW's first step does not depend on the gradient's size."""
    moved = {}
    for share in (1.0, 0.25):
        trained = policy()
        before = weights(trained)
        next(fit(trained, losses(trained), 10, LR, rate=lambda _, share=share: share))
        moved[share] = weights(trained) - before
    assert moved[1.0].abs().max() > 0
    torch.testing.assert_close(moved[0.25], 0.25 * moved[1.0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("updates", [1, 7, 20, 700])
def test_the_cosine_is_the_rate_where_none_is_given_to_the_bit(updates):
    """Halves are exact in floating point, so that the order in which they are multiplied does not matter."""
    for share in (1.0, 0.25):
        for i in range(updates):
            before = share * min(1.0, (i + 1) / 20) * 0.5 * (1 + math.cos(math.pi * i / updates))
            assert share * cosine(i, updates) * min(1.0, (i + 1) / 20) == before
    one, other = policy(), policy()
    list(fit(one, losses(one), updates, LR))
    list(fit(other, losses(other), updates, LR, rate=lambda taken: cosine(taken, updates)))
    assert torch.equal(weights(one), weights(other))


def test_averaged_weights_can_be_seen_and_replaced_before_the_next_update():
    """The average that is seen after an update is what a training that ends there leaves behind."""
    whole, ended = policy(), policy()
    updates = fit(whole, losses(whole), 30, LR, ema_decay=0.9, rate=lambda _: 1.0)
    update = [next(updates) for _ in range(12)][-1]
    list(fit(ended, islice(losses(ended), 12), 30, LR, ema_decay=0.9, rate=lambda _: 1.0))
    raw = whole.snapshot()
    assert all(map(torch.equal, update.weights.average(), ended.snapshot()))
    assert not all(map(torch.equal, raw, ended.snapshot()))
    assert all(map(torch.equal, whole.snapshot(), raw)), "seen, not taken"
    other = [torch.full_like(value, 0.5) for value in raw]
    update.weights.restart(other)
    assert all(map(torch.equal, whole.snapshot() + update.weights.average(), 2 * other))
    next(updates)
    assert all((value == 0.5).all() for value in other), "the snapshot is a copy of its own"
    moved = [abs(float((value - 0.5).abs().max())) for value in update.weights.average()]
    assert 0 < max(moved) < 2 * max(LR.values()), "an average of what was given and of one step from it"
