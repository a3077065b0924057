"""What holds of every family of pre-trained models."""

import json
import shutil
import warnings
from copy import deepcopy
from types import SimpleNamespace

import diffusers
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from pipelines import BUILDERS, saved

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.commands.jobs.inspect import in_words, inspected
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.learn.adjoint import Adjoint
from ctrl_diffusion.learn.backprop import Backprop
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.learn.ppo import PPO
from ctrl_diffusion.learn.weighted import Weighted
from ctrl_diffusion.prior.families import FAMILIES, unet
from ctrl_diffusion.prior.precision import PRECISIONS
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.reward import Reward
from ctrl_diffusion.run.run import Run

PROMPTS = ["a seven", "two"]
SIZE = {"Flux": (32, 48), "SDXL": (32, 48)}  # Flux's default is 1024 × 1024; SDXL is told height and width
STEPS = 20
DIFFUSION = [name for name in BUILDERS if name not in ("SD 3", "Flux")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of every family a pipeline as diffusers saves it."""
    root = tmp_path_factory.mktemp("families")
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return {name: (root / name, saved(name, root / name)) for name in BUILDERS}


def opened(folders, name, **options):
    prior = Prior.from_pretrained(folders[name][0], SIZE.get(name))
    return prior.with_prompts(PROMPTS, **options) if prior.text else prior


def given(prior, n=2):
    return {} if prior.classes is None else {"c": torch.arange(n) % 2}


@torch.no_grad()
def told(folders, name, x_t, timestep, c):
    """What the pipeline's own network says under the pipeline's own guidance, written as its own loop has it."""
    pipeline, texts = folders[name][1], [PROMPTS[i] for i in (() if c is None else c)]
    guidance = {"SD 1": 7.5, "SD 2": 7.5, "SDXL": 5.0, "SD 3": 7.0, "Flux": 3.5}.get(name)
    t = timestep.expand(len(x_t))
    if name == "DDPM":
        return pipeline.unet(x_t, t).sample
    if name == "DiT":
        return pipeline.transformer(x_t, t, class_labels=c).sample[:, :4]
    if name in ("SD 1", "SD 2"):
        asked, without = pipeline.encode_prompt(texts, "cpu", 1, True)
        halves = [pipeline.unet(x_t, t, h).sample for h in (asked, without)]
    if name == "SDXL":
        asked, without, pooled, unpooled = pipeline.encode_prompt(texts, device="cpu")
        ids = torch.tensor([[32.0, 48, 0, 0, 32, 48]]).repeat(len(x_t), 1)
        halves = [
            pipeline.unet(x_t, t, h, added_cond_kwargs={"text_embeds": p, "time_ids": ids}).sample
            for h, p in ((asked, pooled), (without, unpooled))
        ]
    if name == "SD 3":
        asked, without, pooled, unpooled = pipeline.encode_prompt(texts, None, None, device="cpu")
        halves = [pipeline.transformer(x_t, h, p, t).sample for h, p in ((asked, pooled), (without, unpooled))]
    if name == "Flux":
        asked, pooled, text_ids = pipeline.encode_prompt(texts, None, device="cpu")
        _, height, width = x_t.shape[1:]
        packed = pipeline._pack_latents(x_t, len(x_t), 4, height, width)
        ids = pipeline._prepare_latent_image_ids(len(x_t), height // 2, width // 2, "cpu", torch.float32)
        velocity = pipeline.transformer(
            packed, asked, pooled, t / 1000, ids, text_ids, torch.full((len(x_t),), guidance)
        ).sample  # fmt: skip
        return pipeline._unpack_latents(velocity, 4 * height, 4 * width, 4)
    return halves[1] + guidance * (halves[0] - halves[1])


def compared(found, expected):
    # 1e-4; the states of an ε-model that never was trained grow to hundreds, of which that is less than eight ulps
    torch.testing.assert_close(found, expected, rtol=0, atol=max(1e-4, 1e-6 * float(expected.abs().max())))


def chain(prior, times, eta):
    x = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return rollout(prior.denoiser, x, times, eta, torch.Generator().manual_seed(1), cond=given(prior))


@pytest.mark.parametrize(
    ("kind", "eta"),
    [(DDIMScheduler, 0.0), (DDIMScheduler, 1.0), (DDPMScheduler, 1.0)],
    ids=["DDIM 0", "DDIM 1", "DDPM"],
)
@pytest.mark.parametrize("name", DIFFUSION)
def test_trajectories_are_those_of_diffusers(folders, name, kind, eta):
    """Whatever scheduler a pipeline was shipped with: another one on its betas, its network, the same noise."""
    prior = opened(folders, name)
    shipped = folders[name][1].scheduler.config
    scheduler = kind.from_config(shipped, clip_sample=False, timestep_spacing="leading", variance_type="fixed_small")
    train = shipped.num_train_timesteps
    ks = list(range(train - 1, 0, -train // STEPS))
    if kind is DDPMScheduler:
        scheduler.set_timesteps(timesteps=ks)
    else:
        scheduler.set_timesteps(STEPS)
    path = chain(prior, tuple((k + 1) / train for k in ks), eta)
    same = torch.Generator().manual_seed(1)
    for i, k in enumerate(ks[:-1]):
        noise = {"variance_noise": path.z[i]} if kind is DDIMScheduler and eta else {}
        options = {"eta": eta, **noise} if kind is DDIMScheduler else {"generator": same}
        x = scheduler.step(
            told(folders, name, path.x[i], torch.tensor(k), given(prior).get("c")), k, path.x[i], **options
        )
        compared(path.x[i + 1], x.prev_sample)
    assert i + 1 >= 10


@pytest.mark.parametrize("name", ["SD 3", "Flux"])
def test_trajectories_are_those_of_flow_matching(folders, name):
    """Down to x_0, which is what Euler's last step makes of the chain's last state; the shift is the scheduler's."""
    prior, pipeline = opened(folders, name), folders[name][1]
    even = torch.linspace(1, 0.1, STEPS).tolist()
    tokens = prior.denoiser.shape[1] * prior.denoiser.shape[2] // 4
    mu = calculate_shift(tokens, 4, 64) if name == "Flux" else None
    pipeline.scheduler.set_timesteps(sigmas=even, mu=mu)
    shifted = [prior.denoiser.schedule.shifted(t) for t in even]
    torch.testing.assert_close(torch.tensor([*shifted, 0.0]), pipeline.scheduler.sigmas, rtol=0, atol=1e-6)
    path = chain(prior, tuple(shifted), 0.0)
    plain = FlowMatchEulerDiscreteScheduler()
    plain.set_timesteps(sigmas=shifted)
    for i, k in enumerate(plain.timesteps):
        velocity = told(folders, name, path.x[i], k, given(prior)["c"])
        x = plain.step(velocity, k, path.x[i]).prev_sample
        compared(path.x[i + 1] if i + 1 < len(path.x) else path.x_0, x)
    assert i + 1 >= 10


def controlled(prior, seed=0, scale=0.1):
    """A policy whose control does something."""
    control = LoRAControl("ink", "1234", prior.denoiser, rank=4, seed=seed)
    with torch.no_grad():
        for parameters in control.parameter_groups().values():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * scale)
        control.table.weight[-1].zero_()
    return Policy(prior.denoiser, control)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_null_control_is_the_network_itself(folders, name):
    """Bit for bit at equal batch, and another label is not."""
    x = torch.randn(2, *opened(folders, name).denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = opened(folders, name)
        expected = bare.denoiser(x, 0.5, **given(bare))
        prior = opened(folders, name)
        policy = controlled(prior)
        null = torch.full((2,), NULL)
        assert torch.equal(policy(x, 0.5, labels={"ink": null}, **given(prior)), expected)
        assert torch.equal(policy.prior(x, 0.5, **given(prior)), expected)
        steered = policy(x, 0.5, labels={"ink": torch.tensor([1, 2])}, **given(prior))
        assert (steered - expected).flatten(1).abs().amax(1).min() > 1e-3
        # a row's control is its own, in both halves of the guidance
        mixed = policy(x, 0.5, labels={"ink": torch.tensor([1, NULL])}, **given(prior))
        compared(mixed, torch.stack([steered[0], expected[1]]))


def half_stored(folders, name, dtype):
    """A pipeline's prior whose network has its weights in half precision."""
    prior = opened(folders, name)
    prior.denoiser.network.to(dtype)
    return prior


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
        bare = prior.denoiser(x, 0.5, **given(prior))
        policy = controlled(prior, scale=0.3)
        assert torch.equal(policy(x, 0.5, labels={"ink": torch.full((2,), NULL)}, **given(prior)), bare)
        labels = {"ink": torch.tensor([1, 2])}
        steered, expected = (p(x, 0.5, labels=labels, **given(prior)) for p in (policy, full))
        before = full.prior(x, 0.5, **given(prior))
    assert steered.dtype == bare.dtype == torch.float32
    # a rounding of 2⁻⁸ (bf16) or 2⁻¹¹ at each of some ten layers, through guidance
    close = (0.15 if precision == "bf16" else 0.03) * float(before.abs().max())
    torch.testing.assert_close(bare, before, rtol=0, atol=close)
    said, meant = (steered - bare).flatten(), (expected - before).flatten()
    # what rounding adds is less than half of what the control says
    assert torch.cosine_similarity(said, meant, dim=0) > 0.9


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

    # asked of the optimiser's input: fit empties the gradients after its step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "zero_grad", lambda self, set_to_none=True: None)
        half, full = gradient(precision), gradient("no")
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(half, full, dim=0) > 0.95
    assert float(half.norm() / full.norm()) == pytest.approx(1.0, rel=0.1)


def test_the_certificate_is_in_full_precision(folders):
    """The KL of a small control in bfloat16 is that of the rounding; probes and certificates do not know of it."""
    found = {}
    for precision in ("no", "bf16"):
        prior = opened(folders, "SD 1").placed("cpu", precision)
        policy = controlled(prior, scale=1e-4)
        cond, labels = given(prior, 4), {"ink": torch.arange(4)}
        times = prior.denoiser.times(5, 0.2)

        def kl(policy=policy, times=times, cond=cond, labels=labels):
            return paths(policy, 4, times, torch.Generator().manual_seed(0), cond, labels, compare=True).kl.mean()

        with policy.base.full_precision():
            found[precision] = kl()
        found[f"{precision}, as trained"] = kl()
    assert found["bf16"] == found["no"] == found["no, as trained"]
    assert found["bf16, as trained"] > 10 * found["no"]


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


def test_adapters_are_as_asked(folders, tmp_path):
    """Rank, α and layers; saved and loaded; what α over the rank is, the control is multiplied by."""
    prior = opened(folders, "SD 1")
    control = LoRAControl("ink", "1234", prior.denoiser, rank=4, alpha=8, targets=["to_q"])
    named = [key for key, m in prior.denoiser.network.named_modules() if m in control._layers]
    assert named
    assert all(key.endswith("to_q") for key in named)
    with torch.no_grad():
        for p in control.parameter_groups()["adapter"]:
            p.normal_()
    layer = control._layers[0]
    a, b = layer.lora_A[control.adapter].weight, layer.lora_B[control.adapter].weight
    torch.testing.assert_close(control._differences()[0], 2 * b @ a)
    control.save(tmp_path)
    again = LoRAControl.load(tmp_path, opened(folders, "SD 1").denoiser)
    assert (again.rank, again.alpha, again.targets) == (4, 8, ["to_q"])
    torch.testing.assert_close(again._differences()[0], control._differences()[0])
    for wrong in (["no_such_layer"], ["to_q", "no_such_layer"]):
        with pytest.raises(ValueError, match="lora_targets: the network has no layer whose name .* 'no_such_layer'"):
            LoRAControl("other", "1234", prior.denoiser, targets=wrong)


# each update sees every step of the rollout
LEARNERS = {
    "weighted": lambda times, x_0: Weighted(x_0, times, batch=32),
    "adjoint": lambda times, x_0: Adjoint(times, 16, regressed=3),
    "backprop": lambda times, x_0: Backprop(times, 16),
    "ppo": lambda times, x_0: PPO(times, 16, surrogates=3),
}


class Darkness:
    """p(y | x) of classes by the mean of the images."""

    def __init__(self, classes=2):
        self.slopes = torch.linspace(100, -100, classes)

    def log_prob(self, x):
        return (x.flatten(1).mean(1, keepdim=True) * self.slopes).log_softmax(1)


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_of_every_learner_is_uphill_and_trains_the_control_alone(folders, name, learner):
    """On a fixed batch −J falls, or what a learner has for it: ppo its surrogate, the weighted one its regression."""
    prior = opened(folders, name)
    policy = Policy(prior.denoiser, LoRAControl("dark", "01", prior.denoiser, rank=4))
    before = {key: value.clone() for key, value in prior.denoiser.network.state_dict().items() if "lora_" not in key}
    conditions = Conditions({} if prior.classes is None else {"c": torch.arange(2)}, {"dark": 2})
    times = prior.denoiser.times(3, 0.2)
    reward = Reward({"dark": Darkness()}, codec=prior.codec)
    n = 32 * conditions.groups
    cond = conditions.cond_of(torch.arange(n) * conditions.groups // n)
    x_0 = paths(prior.denoiser, n, times, torch.Generator().manual_seed(1), cond).x_0

    def stream():
        return LEARNERS[learner](times, x_0)(policy, reward, conditions, torch.Generator().manual_seed(2))

    def cost(step):
        return step.metrics["kl"] - step.metrics["reward"] if learner == "adjoint" else float(step.loss.detach())

    steps = stream()
    first = next(steps)
    list(fit(policy, iter([first]), 1, {"embedding": 3e-6, "adapter": 3e-6}, warmup=1))
    # ppo's next update is on the same paths; the others' streams begin anew with the same noise
    assert cost(next(steps if learner == "ppo" else stream())) <= cost(first)
    after = prior.denoiser.network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert any(p.any() for p in policy.parameter_groups()["embedding"])
    # the half of the adapter that begins at zero, in every layer the network reaches
    half = [value for key, value in after.items() if ".lora_B." in key]
    assert sum(bool(value.any()) for value in half) > len(half) / 2


def test_a_family_may_be_added_from_outside(folders, tmp_path, monkeypatch):
    """One row of FAMILIES; nothing else needs to know."""
    shutil.copytree(folders["DDPM"][0], tmp_path / "mine")
    edit(tmp_path / "mine" / "model_index.json", _class_name="MyPipeline")
    with pytest.raises(ValueError, match="holds a MyPipeline; supported: DDPMPipeline"):
        Prior.from_pretrained(tmp_path / "mine")
    monkeypatch.setitem(FAMILIES, "MyPipeline", SimpleNamespace(load=unet.load, PARTS=("unet",), ALONE=True))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        same = Prior.from_pretrained(tmp_path / "mine").denoiser(x, 0.5)
        assert torch.equal(same, opened(folders, "DDPM").denoiser(x, 0.5))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_pipeline_is_inspected(folders, name):
    """What is said is what diffusers' own objects say."""
    prior, pipeline = opened(folders, name), folders[name][1]
    bare = sum(p.numel() for p in prior.denoiser.network.parameters())
    found = inspected(prior)
    assert (found["family"], found["parameters"]) == (type(pipeline).__name__, bare)
    kinds = {"SD 2": "v_prediction", "SD 3": "flow", "Flux": "flow"}
    assert found["prediction_type"] == kinds.get(name, "epsilon")
    assert found["schedule"] == ("RectifiedFlow" if kinds.get(name) == "flow" else "VariancePreserving")
    assert 0 < found["control_parameters"]
    assert found["step"]["memory_mb"]["activations"] > 0
    assert in_words(found).startswith("family       " + found["family"])


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
@pytest.mark.parametrize("name", ["SD 1", "SDXL", "SD 3", "Flux"])
def test_images_need_not_be_square(folders, name, size):
    """Nor of the size a family was trained on; latents and images are of the size asked for."""
    prior = Prior.from_pretrained(folders[name][0], size).with_prompts(PROMPTS)
    assert prior.denoiser.shape == (4, size[0] // 4, size[1] // 4)
    with torch.no_grad():
        images = prior.decode(prior.denoiser(torch.randn(2, *prior.denoiser.shape), 0.5, **given(prior)))
    assert images.shape == (2, 3, *size)
    assert prior.encode(images).shape == (2, *prior.denoiser.shape)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("SD 1", (30, 32), "size 30×32: height and width must be multiples of 4"),
        ("Flux", (36, 32), "size 36×32: height and width must be multiples of 8"),
        ("DDPM", (16, 16), "size 16×16: it makes images of 8×8 only"),
        ("DiT", (16, 16), "size 16×16: it makes images of 32×32 only"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(folders, name, size, message):
    with pytest.raises(ValueError, match=message) as caught:
        Prior.from_pretrained(folders[name][0], size)
    assert "\n" not in str(caught.value)


def test_large_images_may_be_decoded_in_tiles(folders):
    """Of the size asked for, and differentiable; other families' priors have nothing to tile."""
    prior = Prior.from_pretrained(folders["SD 1"][0], (64, 96)).placed("cpu", tiling=True)
    assert prior.codec.vae.use_tiling
    tiles = []
    prior.codec.vae.decoder.register_forward_hook(lambda module, given, out: tiles.append(out.shape[2:]))
    z = torch.randn(1, *prior.denoiser.shape, requires_grad=True)
    images = prior.decode(z)
    assert images.shape == (1, 3, 64, 96)
    assert len(tiles) > 1
    images.sum().backward()
    assert z.grad.flatten(2).any(2).all()
    assert opened(folders, "DDPM").placed("cpu", tiling=True).latent is False


@pytest.mark.parametrize("name", ["SD 1", "SDXL", "SD 3", "Flux", "DiT"])
def test_attention_is_pytorchs_own(folders, name, monkeypatch):
    """Of the bare network and of one with a control alike."""
    prior, called = opened(folders, name), []  # its prompts are encoded before the count
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(*given, **options):
        called.append(1)
        return attention(*given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    x = torch.randn(2, *prior.denoiser.shape)
    with torch.no_grad():
        prior.denoiser(x, 0.5, **given(prior))
        bare = len(called)
        controlled(prior)(x, 0.5, labels={"ink": torch.tensor([0, 1])}, **given(prior))
    assert bare > 0
    assert len(called) == 2 * bare


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("name", ["SDXL", "SD 3", "Flux"])
@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_second_encoder_that_is_missing_is_one_line(folders, tmp_path, name, part):
    shutil.copytree(folders[name][0], tmp_path / "broken")
    edit(tmp_path / "broken" / "model_index.json", **{part: [None, None]})
    with pytest.raises(ValueError, match=f"cannot be loaded: it lacks its {part}"):
        Prior.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize(("name", "part"), [("DDPM", "unet"), ("DiT", "transformer"), ("SD 1", "scheduler")])
def test_a_part_that_is_not_there_is_one_line(folders, tmp_path, name, part):
    shutil.copytree(folders[name][0], tmp_path / "broken")
    edit(tmp_path / "broken" / "model_index.json", **{part: [None, None]})
    with pytest.raises(ValueError, match=f"broken cannot be loaded: it lacks its {part}"):
        Prior.from_pretrained(tmp_path / "broken")


def test_early_pipelines_have_their_parts_beside_the_index(folders, tmp_path):
    """As many of the best-known DDPMs on the hub."""
    shutil.copytree(folders["DDPM"][0], tmp_path / "early")
    for part in ("unet", "scheduler"):
        for file in (tmp_path / "early" / part).iterdir():
            file.rename(tmp_path / "early" / file.name)
        (tmp_path / "early" / part).rmdir()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        found, expected = (Prior.from_pretrained(f).denoiser(x, 0.5) for f in (tmp_path / "early", folders["DDPM"][0]))
    assert torch.equal(found, expected)


def test_a_flow_is_not_read_from_a_scheduler_of_diffusion(folders, tmp_path):
    shutil.copytree(folders["SD 3"][0], tmp_path / "broken")
    edit(tmp_path / "broken" / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    DDIMScheduler().save_pretrained(tmp_path / "broken" / "scheduler")
    with pytest.raises(ValueError, match="it is a flow, whose schedule is read from FlowMatchEuler.*not DDIMScheduler"):
        Prior.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("name", ["SD 1", "SDXL", "SD 3", "Flux"])
def test_encoders_stored_in_half_precision_are_used_in_full(folders, tmp_path, name):
    folder, pipeline = folders[name]
    shutil.copytree(folder, tmp_path / "half")
    for part in ("text_encoder", "text_encoder_2"):
        if part in pipeline.components:
            deepcopy(pipeline.components[part]).half().save_pretrained(tmp_path / "half" / part)
    prior = Prior.from_pretrained(tmp_path / "half", SIZE.get(name)).with_prompts(PROMPTS)
    x = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (p.denoiser(x, 0.5, **given(p)) for p in (prior, opened(folders, name)))
    # half a precision of the encoders' weights, 2⁻¹¹, through the guided network
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_what_sdxl_takes_for_no_text_is_zeros_unless_its_index_says_otherwise(folders, tmp_path):
    """A flag that is left out has the default of diffusers."""
    nulls = []
    for i, flag in enumerate([None, True, False]):
        folder = tmp_path / str(i)
        shutil.copytree(folders["SDXL"][0], folder)
        index = json.loads((folder / "model_index.json").read_text())
        index.pop("force_zeros_for_empty_prompt")
        index |= {} if flag is None else {"force_zeros_for_empty_prompt": flag}
        (folder / "model_index.json").write_text(json.dumps(index))
        nulls.append(Prior.from_pretrained(folder).text.encode(["two"], "")[1]["encoder_hidden_states"])
    assert [bool(null.any()) for null in nulls] == [False, False, True]


def test_guidance_without_text_is_refused(folders, tmp_path, ctrl_here):
    (tmp_path / "settings.yaml").write_text("guidance: 4.0")
    done = ctrl_here(
        "train", "--prior", folders["DiT"][0], "--data", tmp_path, "--control", "dark", "--config",
        tmp_path / "settings.yaml", "--out", tmp_path / "run",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2, "ctrl: guidance and negative_prompt: this prior is given no text. Leave them out.\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "cannot be loaded"),
        (lambda folder: edit(folder / "model_index.json", text_encoder=[None, None]), "it lacks its text_encoder"),
        (lambda folder: edit(folder / "scheduler/scheduler_config.json", prediction_type="karras"), "prediction"),
        (lambda folder: edit(folder / "scheduler/scheduler_config.json", prediction_type="flow"), "known: epsilon"),
        (lambda folder: edit(folder / "unet/config.json", time_cond_proj_dim=8), "is given the guidance"),
        (lambda folder: edit(folder / "model_index.json", _class_name=["pipeline", "ControlledPipeline"]), "holds a"),
        (lambda folder: truncate(folder / "text_encoder/model.safetensors"), "cannot be loaded"),
    ],
)
def test_a_broken_text_pipeline_is_one_line(folders, tmp_path, change, message):
    folder = tmp_path / "broken"
    shutil.copytree(folders["SD 1"][0], folder)
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        Prior.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_names_alone(monkeypatch, folders):
    """What it gives is a folder, without pickles; what it does not is one line."""
    asked = {}
    given_back = str(folders["SD 1"][0])
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda name, **how: asked.update(how) or given_back)
    assert Prior.from_pretrained("someone/something").pipeline == "StableDiffusionPipeline"
    assert asked["use_safetensors"] is True
    monkeypatch.undo()
    with pytest.raises(ValueError, match="someone/something is no folder here, and the hub does not give it") as caught:
        Prior.from_pretrained("someone/something")
    assert "\n" not in str(caught.value)


def test_prompts_are_numbered_and_guided(folders):
    """f(∅) + g (f(c) − f(∅)); a new prompt is numbered after the others and changes none of them."""
    one, guided = (opened(folders, "SD 1", guidance=g) for g in (1.0, 3.0))
    empty = Prior.from_pretrained(folders["SD 1"][0]).with_prompts([""], guidance=1.0)
    x, t = torch.randn(2, 4, 8, 8), 0.5
    with torch.no_grad():
        f, f_null = one.denoiser(x, t, **given(one)), empty.denoiser(x, t, c=torch.zeros(2, dtype=torch.long))
        compared(guided.denoiser(x, t, **given(one)), f_null + 3 * (f - f_null))
        assert guided.number_of("a nine") == 2
        assert guided.number_of("two") == 1
        assert guided.class_names == ("a seven", "two", "a nine")
        compared(guided.denoiser(x, t, **given(one)), f_null + 3 * (f - f_null))
        nine = guided.denoiser(x, t, c=torch.tensor([2, 2]))
        assert (nine - guided.denoiser(x, t, **given(one))).flatten(1).abs().amax(1).min() > 1e-3
    with pytest.raises(ValueError, match="distinct"):
        one.with_prompts(["two", "two"])
    with pytest.raises(ValueError, match="is given no text"):
        Prior.from_pretrained(folders["DiT"][0]).with_prompts(["two"])


@pytest.mark.filterwarnings("ignore:log Z")
@pytest.mark.parametrize("source", ["file", "column"])
def test_a_text_model_goes_through_the_whole_job(folders, ctrl_here, tmp_path, source):
    """Prompts of a file, p̂ and pictures on images; or those of the data, p̂ on latents, and each update in parts; then a
    prompt nobody trained."""
    dark = torch.arange(60) % 2
    x = torch.where(dark[:, None, None, None] == 1, -0.5, 0.5) + 0.1 * torch.randn(60, 3, 32, 32)
    labels = {"prompt": torch.arange(60) // 30, "dark": dark}
    write_imagefolder(tmp_path / "data", LabelledImages(x, labels, {"prompt": tuple(PROMPTS), "dark": ("no", "yes")}))
    (tmp_path / "prompts.txt").write_text("a seven\n\ntwo\n")
    tiny = {
        "classifier": {"updates": 60, "grid": 1, "depth": 1, "head": "categorical", "latents": source == "column"},
        "micro_batch": 3 if source == "column" else None, "lora_alpha": 4.0, "lora_targets": ["to_q", "to_k"],
        "weighted": {"updates": 2, "batch": 4, "cache": 8, "renoising": 2}, "adjoint": {"updates": 2, "batch": 4},
        "evaluation": {"prior_samples": 8, "paths": 8, "probes": 1, "sweep_paths": 8}, "steps": 3, "rank": 2,
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    run = tmp_path / "run"
    given = ["--prompts", tmp_path / "prompts.txt"] if source == "file" else ["--condition", "prompt"]
    done = ctrl_here(
        "train", "--prior", folders["SD 1"][0], *given, "--data", tmp_path / "data", "--control", "dark", "--config",
        tmp_path / "tiny.yaml", "--quiet", "--out", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["prompts"], config["classes"], config["guidance"]) == (PROMPTS, [0, 1], 7.5)
    opened = Run.load(run)
    assert opened.policy.controls["dark"].targets == ["to_q", "to_k"]
    shape = (4, 8, 8) if source == "column" else (3, 32, 32)
    p_hat, judge = opened.panels["dark"].classifier, opened.panels["dark"].judge
    assert (p_hat.latent, p_hat.shape["channels"], judge.shape["channels"]) == (source == "column", shape[0], 3)
    z = torch.randn(2, 4, 8, 8)
    seen = z if source == "column" else opened.prior.decode(z)
    y = torch.tensor([0, 1])
    expected = p_hat.log_prob(seen).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(opened.reward(z, {"dark": y}), expected)
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["ctrl"]["class_accuracy"] is None) == (source == "file")
    assert Image.open(next((run / "samples").glob("0*.png"))).size == (32, 32)
    asked = ["sample", run, "--set", "dark=yes", "--class", "a nine", "-n", 2, "--quiet", "--out", tmp_path / "nine"]
    assert ctrl_here(*asked).returncode == 0
    column = "c" if source == "file" else "prompt"
    assert (tmp_path / "nine" / "metadata.csv").read_text().splitlines()[:2] == [
        f"file_name,{column},dark",
        "00000.png,a nine,yes",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "this prior is given text. Name the prompts to train on: --prompts FILE, or the column with --condition"),
        (["--prompts", "{many}"], "many.txt has 65 prompts; 64 at most are trained one by one"),
        (["--prompts", "{none}"], "is no file of prompts, one a line"),
        (["--prompts", "{empty}"], "has no prompts. Write one a line"),
        (["--condition", "caption"], "has no column caption; it has: file_name, dark"),
        (["--condition", "dark"], "--condition and --control both name the column 'dark'"),
    ],
)
def test_prompts_that_are_not_there_are_one_line(folders, ctrl_here, tmp_path, arguments, message):
    write_imagefolder(
        tmp_path / "data", LabelledImages(torch.zeros(2, 3, 8, 8), {"dark": torch.arange(2)}, {"dark": ("no", "yes")})
    )
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "many.txt").write_text("\n".join(f"number {i}" for i in range(65)))
    names = {name: tmp_path / f"{name}.txt" for name in ("none", "empty", "many")}
    done = ctrl_here(
        "train", "--prior", folders["SD 1"][0], "--data", tmp_path / "data", "--control", "dark",
        *(text.format(**names) for text in arguments), "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
