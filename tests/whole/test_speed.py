"""Check what bench/speed.py counts and compares; times are not tested."""

from collections import Counter

import pytest
import torch
from reference import Reference
from setting import CLASSES, K, Setting, evaluations, write_tiny

from ctrl_diffusion.learn.backprop import Backprop

BATCH, STEPS = 3, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


def moved(setting):
    """Its control, away from zero."""
    with torch.no_grad():
        for i, p in enumerate(setting.policy.trainable()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return setting


@pytest.mark.parametrize("name", ["sampling", "prior's sampling", "weighted", "adjoint", "lean", "backprop", "ppo"])
def test_an_update_calls_the_network_as_often_as_the_table_says(tiny, name):
    setting = moved(Setting.from_folder(tiny, STEPS, latent=True))
    policy, calls = setting.policy, Counter()
    first = policy.trainable()[0]

    def count(module, args):
        kind = "policy" if policy.controls["y0"]._shift is not None else "prior"
        asked = ("x" if args[0].requires_grad else "") + ("θ" if kind == "policy" and first.requires_grad else "")
        kind = f"{kind} {asked}" if torch.is_grad_enabled() and asked else kind
        calls[kind, len(args[0]) // (2 * BATCH)] += 1  # twice a sample, for guidance

    run = setting.run(name, BATCH)
    setting.prior.denoiser.network.register_forward_pre_hook(count)
    for _ in range(2):
        calls.clear()
        run()
        assert dict(calls) == evaluations(name, STEPS, K)


@pytest.mark.parametrize("micro", [None, 2])
def test_the_reference_schedule_computes_the_same_loss_and_gradient(tiny, micro):
    """Four checkpointed calls a step and a second network, or one each and none: equal mathematics."""
    setting = moved(Setting.from_folder(tiny, STEPS))
    reference = Reference(str(tiny), setting.times)
    table = setting.policy.controls["y0"].table.weight
    own = [p for key, p in setting.prior.denoiser.network.named_parameters() if "lora_" in key]
    theirs = [p for key, p in reference.unet.named_parameters() if "lora_" in key]
    with torch.no_grad():
        for p, q in zip([table[:CLASSES], *own], [reference.table.weight, *theirs], strict=True):
            q.copy_(p)
    learner = Backprop(setting.times, BATCH, micro=micro, clip=float("inf"))
    generator = torch.Generator().manual_seed(0)  # drawn as the learner draws it
    labels, cond = setting.conditions.of(setting.conditions.draw(BATCH, generator))
    x_1, *noise = (torch.randn(BATCH, *setting.policy.shape, generator=generator) for _ in setting.times)
    loss = 0.0
    for step in learner(setting.policy, setting.reward, setting.conditions, torch.Generator().manual_seed(0)):
        step.loss.backward()
        loss += float(step.loss)
        if step.last:
            break
    expected = reference.loss(x_1, noise, cond["c"], labels["y0"])
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-4)
    found = [table.grad[:CLASSES], *(p.grad for p in own)]
    for gradient, q in zip(found, [reference.table.weight, *theirs], strict=True):
        torch.testing.assert_close(gradient, q.grad, rtol=2e-3, atol=1e-4 * float(q.grad.abs().max()))
