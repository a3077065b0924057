"""A control that does not see the prior's condition c changes x̂ alike under every c."""

import json

import pytest
import torch

from ctrl_diffusion.control.control import NewerFormatError, read_about
from ctrl_diffusion.control.kinds import load_control
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS

B, T = 6, 0.5
X = torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(0))
C, Y = torch.arange(B), torch.tensor([0, 1, 2, 3, 0, 1])


def control(denoiser, name="ink", **options):
    """One with something to say: every parameter, the zero half too, is random."""
    made = LoRAControl(name, "1234", denoiser, rank=4, **options)
    with torch.no_grad():
        for i, parameter in enumerate(sum(made.parameter_groups().values(), [])):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return made


@torch.no_grad()
def test_what_it_changes_is_what_it_changes_without_a_condition(digits):
    policy = Policy(digits.denoiser, control(digits.denoiser, sees_condition=False))
    bare, labels = Prior.from_pretrained(DIGITS).unconditional().denoiser, {"ink": Y}
    alone = Policy(bare, control(bare))(X, T, labels)
    expected = digits.denoiser(X, T, c=C) + (alone - bare(X, T))
    steered = policy(X, T, labels, c=C)
    torch.testing.assert_close(steered, expected, rtol=0, atol=1e-5)
    # under any other c by the same amount, which is not what one that sees c does
    changed = [policy(X, T, labels, c=c) - digits.denoiser(X, T, c=c) for c in (C, C + 4)]
    torch.testing.assert_close(*changed, rtol=0, atol=1e-5)
    policy.controls["ink"].sees_condition = True
    seeing = [policy(X, T, labels, c=c) - digits.denoiser(X, T, c=c) for c in (C, C + 4)]
    assert (seeing[0] - seeing[1]).abs().amax((1, 2, 3)).min() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_null_is_the_prior_bit_for_bit_and_strength_is_linear(digits, strength):
    policy = Policy(digits.denoiser, control(digits.denoiser, sees_condition=False))
    bare, full = digits.denoiser(X, T, c=C), policy(X, T, {"ink": Y}, c=C)
    assert torch.equal(policy(X, T, {"ink": torch.full((B,), NULL)}, strength=strength, c=C), bare)
    steered = policy(X, T, {"ink": Y}, strength=strength, c=C)
    torch.testing.assert_close(steered, torch.lerp(bare, full, strength), rtol=0, atol=1e-5)
    rows = torch.tensor([0, NULL, 2, NULL, 0, 1])
    mixed = policy(X, T, {"ink": rows}, strength=strength, c=C)
    assert torch.equal(mixed[rows == NULL], bare[rows == NULL])


@torch.no_grad()
def test_beside_one_that_sees_the_condition_what_both_change_is_added(digits):
    hidden, seeing = control(digits.denoiser, sees_condition=False), control(digits.denoiser, "slant")
    policy, bare = Policy(digits.denoiser, hidden, seeing), digits.denoiser(X, T, c=C)
    both = policy(X, T, {"ink": Y, "slant": Y}, c=C)
    alone = [policy(X, T, {name: Y}, c=C) for name in ("ink", "slant")]
    torch.testing.assert_close(both, alone[0] + alone[1] - bare, rtol=0, atol=1e-5)


def test_its_gradient_is_of_its_own_evaluation(digits):
    """The two evaluations of the prior have no parameter to learn; the adjoint needs all three."""
    policy = Policy(digits.denoiser, control(digits.denoiser, sees_condition=False))
    x, parameters = X.clone().requires_grad_(True), policy.trainable()
    gradients = torch.autograd.grad(policy(x, T, {"ink": Y}, c=C).sum(), [*parameters, x])
    bare = Prior.from_pretrained(DIGITS).unconditional().denoiser
    alone = Policy(bare, control(bare))
    expected = torch.autograd.grad(alone(X, T, {"ink": Y}).sum(), alone.trainable())
    for ours, theirs in zip(gradients, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    of_x = [torch.autograd.grad(f(x).sum(), x)[0] for f in (
        lambda x: digits.denoiser(x, T, c=C), lambda x: alone(x, T, {"ink": Y}), lambda x: bare(x, T)
    )]  # fmt: skip
    torch.testing.assert_close(gradients[-1], of_x[0] + of_x[1] - of_x[2], rtol=1e-4, atol=1e-4)


def test_three_evaluations_for_one(digits):
    policy, calls = Policy(digits.denoiser, control(digits.denoiser, sees_condition=False)), []
    digits.denoiser.register_forward_hook(lambda module, args, x_hat: calls.append(len(x_hat)))
    policy(X, T, {"ink": Y}, c=C)
    assert calls == [B] * 3
    policy.controls["ink"].interval = (0.0, 0.1)  # outside, which noise level σ = 0.7 is, the prior alone
    policy(X, T, {"ink": Y}, c=C)
    assert calls == [B] * 4


@pytest.mark.parametrize(("sees_condition", "evaluations"), [(True, 1), (False, 3)])
def test_a_strength_but_one_takes_an_evaluation_more(digits, sees_condition, evaluations):
    policy, calls = Policy(digits.denoiser, control(digits.denoiser, sees_condition=sees_condition)), []
    digits.denoiser.register_forward_hook(lambda module, args, x_hat: calls.append(len(x_hat)))
    for strength, expected in ((1.0, evaluations), (1.5, evaluations + 1), (0.0, 1)):
        calls.clear()
        policy(X, T, {"ink": Y}, strength=strength, c=C)
        assert calls == [B] * expected


def test_it_is_saved_and_older_versions_say_that_they_cannot_read_it(digits, tmp_path):
    policy = Policy(digits.denoiser, control(digits.denoiser, sees_condition=False))
    policy.controls["ink"].save(tmp_path)
    other = Prior.from_pretrained(DIGITS)
    loaded = load_control(tmp_path, other.denoiser)
    assert not loaded.sees_condition
    with torch.no_grad():
        assert torch.equal(Policy(other.denoiser, loaded)(X, T, {"ink": Y}, c=C), policy(X, T, {"ink": Y}, c=C))
    assert json.loads((tmp_path / "control.json").read_text())["format"] == 3
    control(Prior.from_pretrained(DIGITS).denoiser).save(tmp_path)
    about = json.loads((tmp_path / "control.json").read_text())
    assert about["format"] == 2
    assert "sees_condition" not in about
    (tmp_path / "control.json").write_text(json.dumps(about | {"format": 4}))
    with pytest.raises(NewerFormatError, match="up to 3"):
        read_about(tmp_path)


def test_it_is_no_lora_of_another_program(digits):
    with pytest.raises(ValueError, match="three evaluations a step"):
        control(digits.denoiser, sees_condition=False).as_lora(0, 1.0)
