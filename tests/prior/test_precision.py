"""Half precision is the network's own, by autocast or in its weights."""

import shutil
from copy import deepcopy

import pytest
import torch
from pipelines import BUILDERS

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.prior.precision import PRECISIONS
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.reward import Reward
from tests.prior.priors import LEARNERS, PROMPTS, SIZE, Darkness, condition_of, controlled, half_stored, opened


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stored", [False, True], ids=["autocast", "stored"])
@pytest.mark.parametrize("name", BUILDERS)
def test_half_precision_is_the_networks_alone(folders, name, stored, precision):
    """By autocast or in the weights: x̂ is float32 and near the network's, null is bit for bit, the control is heard."""
    dtype = PRECISIONS[precision]
    full = controlled(opened(folders, name), scale=0.3)
    prior = half_stored(folders, name, dtype) if stored else opened(folders, name).placed("cpu", precision)
    x = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = prior.denoiser(x, 0.5, **condition_of(prior))
        policy = controlled(prior, scale=0.3)
        assert torch.equal(policy(x, 0.5, labels={"ink": torch.full((2,), NULL)}, **condition_of(prior)), bare)
        labels = {"ink": torch.tensor([1, 2])}
        steered, expected = (p(x, 0.5, labels=labels, **condition_of(prior)) for p in (policy, full))
        before = full.prior(x, 0.5, **condition_of(prior))
    assert steered.dtype == bare.dtype == torch.float32
    # a rounding of 2⁻⁸ (bf16) or 2⁻¹¹ at each of some ten layers, through guidance
    close = (0.15 if precision == "bf16" else 0.03) * float(before.abs().max())
    torch.testing.assert_close(bare, before, rtol=0, atol=close)
    shift, expected_shift = (steered - bare).flatten(), (expected - before).flatten()
    # what rounding adds is less than half of what the control says
    assert torch.cosine_similarity(shift, expected_shift, dim=0) > 0.9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("learner", ["weighted", "adjoint", "backprop", "ppo"])
def test_what_a_learner_asks_for_in_half_precision_is_what_it_asks_for_in_full(folders, learner, precision):
    """The gradient of an update, in direction and size."""

    def gradient(precision):
        prior = opened(folders, "SD 2", guidance=1.0).placed("cpu", precision)
        policy = controlled(prior, scale=0.3)
        prior.denoiser.loss_scale = 1.0  # this steep reward needs none
        reward = Reward({"ink": Darkness(4)}, codec=prior.codec)
        conditions, times = Conditions({"c": torch.arange(2)}, {"ink": 4}), prior.denoiser.times(3, 0.2)
        x_0 = torch.randn(8, *prior.denoiser.shape, generator=torch.Generator().manual_seed(1))
        stream = LEARNERS[learner](times, x_0)(policy, reward, conditions, torch.Generator().manual_seed(2))
        next(fit(policy, stream, 1, {"embedding": 1e-9, "adapter": 1e-9}, max_norm=1e9), None)
        return torch.cat([p.grad.flatten() for p in policy.trainable()])

    # read off the optimiser's input: fit empties the gradients after its step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "zero_grad", lambda self, set_to_none=True: None)
        half, full = gradient(precision), gradient("no")
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half, full, dim=0) > 0.95
    assert float(half.norm() / full.norm()) == pytest.approx(1.0, rel=0.1)


def test_the_certificate_is_in_full_precision(folders):
    """The KL of a small control in bfloat16 is that of the rounding; probes and certificates do not know of it."""
    kls = {}
    for precision in ("no", "bf16"):
        prior = opened(folders, "SD 1").placed("cpu", precision)
        policy = controlled(prior, scale=1e-4)
        cond, labels = condition_of(prior, 4), {"ink": torch.arange(4)}
        times = prior.denoiser.times(5, 0.2)

        def kl(policy=policy, times=times, cond=cond, labels=labels):
            return paths(policy, 4, times, torch.Generator().manual_seed(0), cond, labels, compare=True).kl.mean()

        with policy.base.full_precision():
            kls[precision] = kl()
        kls[f"{precision}, as trained"] = kl()
    assert kls["bf16"] == kls["no"] == kls["no, as trained"]
    assert kls["bf16, as trained"] > 10 * kls["no"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_adapter_of_a_network_in_half_precision_is_trained_in_full(folders, dtype):
    """Beside W and not in it: W + BA rounds to W where BA is below half an ulp."""
    prior = half_stored(folders, "SD 1", dtype)
    policy = controlled(prior)
    adapter = policy.parameter_groups()["adapter"]
    x, c, y = torch.randn(2, *prior.denoiser.shape), torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    weight = policy.controls["ink"]._layers[0].get_base_layer().weight
    with policy.controls["ink"].active(y):
        assert policy.controls["ink"]._layers[0].get_base_layer().weight is weight
    policy(x, 0.5, labels={"ink": y}, c=c).sum().backward()
    assert {p.dtype for p in adapter} == {p.grad.dtype for p in adapter} == {torch.float32}
    assert all(p.grad.any() for p in adapter)


@pytest.mark.parametrize("name", ["SD 1", "SDXL", "SD 3", "Flux", "PixArt-Sigma", "AuraFlow", "Z-Image"])
def test_encoders_stored_in_half_precision_are_used_in_full(folders, tmp_path, name):
    folder, pipeline = folders[name]
    shutil.copytree(folder, tmp_path / "half")
    for part in ("text_encoder", "text_encoder_2"):
        if part in pipeline.components:
            deepcopy(pipeline.components[part]).half().save_pretrained(tmp_path / "half" / part)
    prior = Prior.from_pretrained(tmp_path / "half", SIZE.get(name)).with_prompts(PROMPTS)
    x = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual, expected = (p.denoiser(x, 0.5, **condition_of(p)) for p in (prior, opened(folders, name)))
    # half a precision of the encoders' weights, 2⁻¹¹, through the guided network
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
