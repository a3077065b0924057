"""Learners spend their updates inside the intervals, and find the gradient of J there."""

from collections import Counter

import pytest
import torch
from silenced import calls_of, silenced, talkative

from ctrl_diffusion.chain.paths import paths, paths_with_states
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.chain.schedule import RectifiedFlow
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.exact.mixtures import ComponentLabel
from ctrl_diffusion.learn.adjoint import Adjoint, adjoints_of
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.contrast import Contrast
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.labelled import Labelled
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.step import steps_to_learn
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.reward.reward import Reward

FLOW = RectifiedFlow()
TIMES = FLOW.times(9, 0.1)  # σ = t = 1, 0.9 … 0.2 at the steps' start
N, B = 9, 24
# intervals, which control is fixed beforehand, and the steps that are left to learn
CASES = {
    "middle": ({"y": (0.45, 0.75)}, "", [3, 4, 5]),
    "beginning": ({"y": (0.75, 1.0)}, "", [0, 1, 2]),
    "end": ({"y": (0.0, 0.35)}, "", [7, 8]),
    "one step": ({"y": (0.45, 0.55)}, "", [5]),
    "two controls": ({"y": (0.75, 0.95), "z": (0.35, 0.55)}, "", [1, 2, 5, 6]),
    "beside a fixed one": ({"y": (0.35, 0.55), "z": None}, "z", [5, 6]),
    "beside a fixed one elsewhere": ({"y": (0.35, 0.55), "z": (0.75, 0.95)}, "z", [5, 6]),
}
ON_POLICY = {
    # every step to learn in one update, and each once
    "adjoint": lambda steps: Adjoint(TIMES, B, regressed=steps, reuse=1, clip=float("inf")),
    "lean adjoint": lambda steps: Adjoint(TIMES, B, regressed=steps, reuse=1, clip=float("inf"), lean=True),
    "backprop": lambda steps: Backprop(TIMES, B, clip=float("inf")),
    "ppo": lambda steps: PPO(TIMES, B, surrogates=steps, reuse=1),
}


def setting(make, case):
    intervals, fixed, steps = CASES[case]
    denoiser = make(FLOW, intervals)
    policy = getattr(denoiser, "policy", denoiser)
    if fixed:
        policy.controls[fixed].fix()
    reward = Reward({name: ComponentLabel(policy.base) for name in intervals})
    return denoiser, policy, reward, Conditions.for_training({}, dict.fromkeys(intervals, 2), fixed and [fixed]), steps


def samples(policy):
    return paths(policy.prior, 60, TIMES, torch.Generator().manual_seed(1)).x_0


def learner_of(name, policy, steps=2):
    if name == "weighted":
        return Weighted(samples(policy), TIMES, B)
    if name == "contrast":
        active = steps_to_learn(policy, TIMES).expand(60, -1)
        return Contrast(paths_with_states(policy.prior, active, TIMES, torch.Generator().manual_seed(1)), TIMES, B)
    if name == "labelled":
        x_0 = samples(policy)
        return Labelled(x_0, {control: torch.arange(len(x_0)) % 2 for control in policy.controls}, {}, TIMES, B)
    return ON_POLICY[name](steps)


LEARNERS = ["contrast", "weighted", "labelled", *ON_POLICY]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ON_POLICY)
def test_the_gradient_is_that_of_explicit_null_labels(name, case):
    """Of all steps of the chain, where silent ones contribute nothing."""
    found = []
    for make, learned in ((talkative, None), (silenced, N)):
        denoiser, policy, reward, conditions, steps = setting(make, case)
        stream = learner_of(name, policy, learned or len(steps))(
            denoiser, reward, conditions, torch.Generator().manual_seed(2)
        )
        step = next(stream)
        gradients = torch.autograd.grad(step.loss, policy.trainable(), allow_unused=True, materialize_grads=True)
        found.append((torch.cat([g.flatten() for g in gradients]), float(step.loss.detach()), step.metrics))
    (ours, loss, metrics), (expected, explicit_loss, explicit_metrics) = found
    assert float(expected.abs().max()) > 1e-3, "there is a gradient to find"
    # float32 sums in another order
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))
    if name == "backprop":  # the others' losses have constants of silent steps
        assert loss == pytest.approx(explicit_loss, rel=1e-4)
    if not case.startswith("beside"):  # a fixed control's KL is at steps that are not visited
        assert float(metrics["kl"]) == pytest.approx(float(explicit_metrics["kl"]), rel=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LEARNERS)
def test_no_update_touches_a_step_outside(name, case):
    """Those inside are learned from equally often."""
    _, policy, reward, conditions, steps = setting(talkative, case)
    visited = Counter()

    def count(module, args, options):
        t = args[1]
        if isinstance(t, torch.Tensor) and t.ndim and torch.is_grad_enabled():
            visited.update((t[:, None] - torch.tensor(TIMES)).abs().argmin(1).tolist())

    policy.register_forward_pre_hook(count, with_kwargs=True)
    stream = learner_of(name, policy)(policy, reward, conditions, torch.Generator().manual_seed(0))
    updates = 4 * len(steps)
    before = policy.snapshot()
    for _ in fit(policy, stream, updates, {"embedding": 1e-2, "adapter": 1e-2}):
        pass
    assert not all(torch.equal(p, q) for p, q in zip(policy.snapshot(), before, strict=True))
    if name == "backprop":  # which goes through the rollout
        assert not visited
        return
    assert sorted(visited) == steps
    share = sum(visited.values()) / len(steps)
    # weighted and labelled take a stratum each, to one row; the others a random order of the steps on each path
    slack = updates if name in ("weighted", "labelled") else 5 * share**0.5
    if name == "contrast":  # a stratum each, too, and a state is asked about once or twice
        slack = updates + share / 2
    assert max(abs(count - share) for count in visited.values()) <= slack


@pytest.mark.parametrize("case", [case for case in CASES if "control" in case or "beside" in case])
@pytest.mark.parametrize("name", LEARNERS)
def test_rows_on_which_nothing_speaks_may_be_alone_in_a_micro_batch(name, case):
    """A row's own controls may be silent where another's speaks; the gradient is that of the whole batch."""
    gradients = []
    for micro in (None, 1):
        _, policy, reward, conditions, _ = setting(talkative, case)
        learner = learner_of(name, policy)
        learner.micro = micro
        stream = learner(policy, reward, conditions, torch.Generator().manual_seed(0))
        updates = list(fit(policy, stream, 1, {"embedding": 1e-3, "adapter": 1e-3}))
        gradients.append(updates[0].gradient_norm)
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-3)
    assert gradients[0] > 0


@pytest.mark.parametrize("name", LEARNERS)
def test_a_chain_on_which_nothing_speaks_is_refused(name):
    _, policy, reward, conditions, _ = setting(talkative, "middle")
    learner = learner_of(name, policy)
    policy.controls["y"].interval = (0.51, 0.59)
    message = r"none of the chain's 9 steps, which begin at σ = 1 … 0\.2; their intervals: y \(0\.51, 0\.59\)\. Widen"
    with pytest.raises(ValueError, match=message):
        next(learner(policy, reward, conditions, torch.Generator().manual_seed(0)))
    policy.controls["y"].interval = None
    policy.controls["y"].fix()
    with pytest.raises(ValueError, match="their intervals: none"):
        next(learner(policy, reward, conditions, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_adjoints_go_back_through_silent_steps(case, lean):
    """By the prior's step alone, one evaluation; and no further than they are needed."""
    found = []
    for make in (talkative, silenced):
        denoiser, policy, _, conditions, steps = setting(make, case)
        labels, _ = conditions.of(torch.arange(conditions.pairs))
        x_1 = torch.randn(conditions.pairs, 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            path = rollout(denoiser, x_1, TIMES, generator=torch.Generator().manual_seed(1), labels=labels)
        end, calls = path.x[-1].pow(2), calls_of(policy.base)
        found.append(adjoints_of(denoiser, path, end, labels, {}, clip=0.1, lean=lean))
        if make is talkative:
            per_step = Counter(calls)
            part = adjoints_of(denoiser, path, end, labels, {}, clip=0.1, lean=lean, first=steps[0])
            for ours, whole in ((part.adjoints, found[0].adjoints), (part.means, found[0].means)):
                assert torch.equal(ours, whole[steps[0] :])
            speaking = [not lean and i > 0 and policy.speaks(t, labels) for i, t in enumerate(TIMES[:-1])]
            if "z" not in labels:  # mixed batches are called group by group
                assert [per_step[t] for t in TIMES[:-1]] == [1 + speaks for speaks in speaking]
    torch.testing.assert_close(found[0].adjoints, found[1].adjoints, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0].means, found[1].means)
    assert found[0].clipped == pytest.approx(found[1].clipped)
    assert 0 < found[0].clipped < 1
