"""At a step where the policy is silent the chain is the prior's: no KL, and no second evaluation to learn so."""

import pytest
import torch
from silenced import calls_of, silenced, talkative

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.schedule import Cosine, RectifiedFlow
from ctrl_diffusion.chain.transition import transition
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.evaluate.certificate import certify

N, B = 8, 4
SCHEDULES = [Cosine(), RectifiedFlow()]
LABELS = {"y": torch.tensor([0, 1, 0, 1]), "z": torch.tensor([1, 1, 0, 0])}
X_1 = torch.randn(B, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
# the steps at which the controls speak: the middle, the beginning, the end, two stretches, none of the chain
SPEAKING = [{"y": [3, 4]}, {"y": [0, 1]}, {"y": [6, 7]}, {"y": [1, 2], "z": [5, 6]}, {"y": []}]


def intervals_of(schedule, speaking):
    """Intervals of noise levels of these steps and no others."""
    sigma = [float(schedule(t)[1]) for t in schedule.times(N, 0.1)]
    return {name: (sigma[steps[-1]], sigma[steps[0]]) if steps else (2.0, 3.0) for name, steps in speaking.items()}


def settings(schedule, speaking, dtype=torch.float64):
    """A policy with intervals, the same told by its labels, the times, the steps where it speaks, and labels."""
    intervals = intervals_of(schedule, speaking)
    twins = [make(schedule, intervals, dtype) for make in (talkative, silenced)]
    steps = sorted(sum(speaking.values(), []))
    return *twins, schedule.times(N, 0.1), steps, {name: LABELS[name] for name in speaking}


def rolled(denoiser, times, **options):
    return rollout(denoiser, X_1, times, generator=torch.Generator().manual_seed(1), **options)


@pytest.mark.parametrize("strength", [1.0, 1.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("speaking", SPEAKING, ids=str)
def test_a_path_is_that_of_explicit_null_labels(speaking, schedule, strength):
    policy, explicit, times, steps, labels = settings(schedule, speaking)
    options = {"labels": labels, "strength": strength, "compare": True}
    with torch.no_grad():
        path, expected = (rolled(denoiser, times, **options) for denoiser in (policy, explicit))
        for name in ("x", "z", "x_0", "kl", "log_ratio"):
            assert torch.equal(getattr(path, name), getattr(expected, name)), name
        for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            assert bool((path.kl[i] == 0).all() and (path.log_ratio[i] == 0).all()) == (i not in steps)
            if i not in steps:
                assert torch.equal(path.x[i + 1], transition(policy.prior, path.x[i], t, s).rsample(path.z[i]))
        assert (path.kl[steps] > 0).all()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("speaking", SPEAKING, ids=str)
def test_a_silent_step_costs_one_evaluation(speaking, compare, gradient):
    policy, _, times, steps, labels = settings(RectifiedFlow(), speaking)
    calls = calls_of(policy.base)
    with torch.set_grad_enabled(gradient):
        path = rolled(policy, times, labels=labels, compare=compare, read=False)
        assert calls == [t for i, t in enumerate(times[:-1]) for _ in range(2 if compare and i in steps else 1)]
        for control in ({}, {"labels": labels, "strength": 0.0}):
            calls.clear()
            bare = rolled(policy, times, compare=compare, read=False, **control)
            assert calls == list(times[:-1]), "no control is asked for"
    assert (path.kl is None) == (bare.kl is None) == (not compare)
    if compare:
        assert not bare.kl.any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("speaking", SPEAKING, ids=str)
def test_the_gradient_of_a_path_is_that_of_explicit_null_labels(speaking, schedule):
    policy, explicit, times, steps, labels = settings(schedule, speaking)
    gradients, inputs = [], X_1.clone().requires_grad_()
    for denoiser, parameters in ((policy, policy.trainable()), (explicit, explicit.policy.trainable())):
        path = rollout(denoiser, inputs, times, generator=torch.Generator().manual_seed(1), labels=labels, compare=True)
        value = path.x_0.pow(3).sum() - path.kl.sum() + path.log_ratio.square().sum()
        found = torch.autograd.grad(value, [inputs, *parameters], allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([g.flatten() for g in found]))
    torch.testing.assert_close(*gradients)
    assert bool(gradients[0][X_1.numel() :].any()) == bool(steps)


def test_on_the_way_back_nothing_is_computed_of_silent_steps_before_the_first_that_speaks():
    policy, _, times, _, labels = settings(RectifiedFlow(), {"y": [3, 4]})
    path = rolled(policy, times, labels=labels, compare=True)
    calls = calls_of(policy.base)
    path.x_0.sum().backward()
    # the last silent steps once, the speaking ones as policy alone: u has no gradient here
    assert calls == [times[i] for i in (7, 6, 5, 4, 3)]


@pytest.mark.parametrize("speaking", SPEAKING[:4], ids=str)
def test_the_certificate_is_that_of_explicit_null_labels(speaking):
    schedule = Cosine()
    policy, explicit, times, *_ = settings(schedule, speaking, torch.float32)
    conditions = Conditions({}, dict.fromkeys(speaking, 2))
    labels, _ = conditions.of(conditions.all(50))
    found = [
        paths(denoiser, conditions.pairs * 50, times, torch.Generator().manual_seed(2), labels=labels, compare=True)
        for denoiser in (policy, explicit)
    ]
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)
    generator = torch.Generator().manual_seed(3)
    table = -torch.rand(1, 4000, conditions.pairs, generator=generator)
    reward = -torch.rand(conditions.pairs * 50, generator=generator)
    ours, expected = (certify(conditions, table, reward - 0 * p.kl, p.kl, p.log_ratio) for p in found)
    assert ours.metrics() == expected.metrics()
    assert ours.kl > 0
