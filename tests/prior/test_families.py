"""What holds of every family of pre-trained models."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from pipelines import BUILDERS

from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.chain.rollout import rollout
from ctrl_diffusion.commands.jobs.inspect import describe, in_words
from ctrl_diffusion.control.conditions import Conditions
from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.data.labels import NULL
from ctrl_diffusion.learn.fit import fit
from ctrl_diffusion.prior.families import FAMILIES, unet
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.reward.reward import Reward
from tests.prior.priors import LEARNERS, PROMPTS, Darkness, assert_close, condition_of, controlled, edit, opened

STEPS = 20
FLOWS = ["SD 3", "Flux", "AuraFlow", "Z-Image"]
DIFFUSION = [name for name in BUILDERS if name not in FLOWS]
TEXT = [name for name in BUILDERS if name not in ("DDPM", "DiT")]


@torch.no_grad()
def network_output(folders, name, x_t, timestep, c):
    """What the pipeline's own network says under the pipeline's own guidance, written as its own loop has it."""
    pipeline, texts = folders[name][1], [PROMPTS[i] for i in (() if c is None else c)]
    guidance = {"SD 1": 7.5, "SD 2": 7.5, "SDXL": 5.0, "SD 3": 7.0, "Z-Image": 5.0}.get(name, 3.5)
    t = timestep.expand(len(x_t))
    if name == "DDPM":
        return pipeline.unet(x_t, t).sample
    if name == "DiT":
        return pipeline.transformer(x_t, t, class_labels=c).sample[:, :4]
    if name in ("SD 1", "SD 2"):
        states, null = pipeline.encode_prompt(texts, "cpu", 1, True)
        halves = [pipeline.unet(x_t, t, h).sample for h in (states, null)]
    if name == "SDXL":
        states, null, pooled, null_pooled = pipeline.encode_prompt(texts, device="cpu")
        ids = torch.tensor([[32.0, 48, 0, 0, 32, 48]]).repeat(len(x_t), 1)
        halves = [
            pipeline.unet(x_t, t, h, added_cond_kwargs={"text_embeds": p, "time_ids": ids}).sample
            for h, p in ((states, pooled), (null, null_pooled))
        ]
    if name == "SD 3":
        states, null, pooled, null_pooled = pipeline.encode_prompt(texts, None, None, device="cpu")
        halves = [pipeline.transformer(x_t, h, p, t).sample for h, p in ((states, pooled), (null, null_pooled))]
    if name == "Flux":
        states, pooled, text_ids = pipeline.encode_prompt(texts, None, device="cpu")
        _, height, width = x_t.shape[1:]
        packed = pipeline._pack_latents(x_t, len(x_t), 4, height, width)
        ids = pipeline._prepare_latent_image_ids(len(x_t), height // 2, width // 2, "cpu", torch.float32)
        velocity = pipeline.transformer(
            packed, states, pooled, t / 1000, ids, text_ids, torch.full((len(x_t),), guidance)
        ).sample  # fmt: skip
        return pipeline._unpack_latents(velocity, 4 * height, 4 * width, 4)
    if name.startswith("PixArt"):
        states, mask, null, null_mask = pipeline.encode_prompt(texts, device="cpu")
        added, guidance = {"resolution": None, "aspect_ratio": None}, 4.5
        if name == "PixArt-alpha":
            added = {"resolution": torch.tensor([[32.0, 48]] * 2), "aspect_ratio": torch.tensor([[32 / 48]] * 2)}
        halves = [
            pipeline.transformer(x_t, h, t, added, encoder_attention_mask=m).sample[:, :4]
            for h, m in ((states, mask), (null, null_mask))
        ]
    if name == "AuraFlow":
        states, _, null, _ = pipeline.encode_prompt(texts, device="cpu")
        halves = [pipeline.transformer(x_t, h, t / 1000).sample for h in (states, null)]
    if name == "Z-Image":
        images, encoded = list(x_t.unsqueeze(2)), pipeline.encode_prompt(texts, "cpu")
        halves = [-torch.stack(pipeline.transformer(images, 1 - t / 1000, h).sample).squeeze(2) for h in encoded]
        return halves[0] + guidance * (halves[0] - halves[1])
    return halves[1] + guidance * (halves[0] - halves[1])


def chain(prior, times, eta):
    x = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return rollout(prior.denoiser, x, times, eta, torch.Generator().manual_seed(1), cond=condition_of(prior))


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
            network_output(folders, name, path.x[i], torch.tensor(k), condition_of(prior).get("c")),
            k,
            path.x[i],
            **options,
        )
        assert_close(path.x[i + 1], x.prev_sample)
    assert i + 1 >= 10


@pytest.mark.parametrize("name", FLOWS)
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
        velocity = network_output(folders, name, path.x[i], k, condition_of(prior)["c"])
        x = plain.step(velocity, k, path.x[i]).prev_sample
        assert_close(path.x[i + 1] if i + 1 < len(path.x) else path.x_0, x)
    assert i + 1 >= 10


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_images_are_those_that_the_pipeline_itself_draws(folders, name):
    """From the same noise, by its own call: prompts, guidance, clock, sign, latents and their scale are its own."""
    prior, pipeline = opened(folders, name), folders[name][1]
    _, height, width = prior.image_shape
    even = torch.linspace(1, 1 / STEPS, STEPS).tolist()
    options = {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": "pt"}
    scheduler, times = pipeline.scheduler, tuple(even)
    if name in FLOWS:
        times = tuple(map(prior.denoiser.schedule.shifted, even))
        options["sigmas"] = even
    else:
        steps = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "steps_offset": 1}
        scheduler = DDIMScheduler.from_config(scheduler.config, **steps)
    if name.startswith("PixArt"):  # else it draws another size and resizes it; cleans prompts where it can
        options |= {"use_resolution_binning": False, "clean_caption": False}
    own = type(pipeline)(**{**pipeline.components, "scheduler": scheduler})
    own.set_progress_bar_config(disable=True)
    path = chain(prior, times, 0.0)
    x = own._pack_latents(path.x[0], 2, *prior.denoiser.shape) if name == "Flux" else path.x[0]
    images = own(list(PROMPTS), latents=x, **options).images
    assert ((images > 0) & (images < 1)).float().mean() > 0.1  # else there would be little to compare
    assert_close(prior.decode(path.x_0).clamp(-1, 1) / 2 + 0.5, images)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_null_control_is_the_network_itself(folders, name):
    """Bit for bit at equal batch, and another label is not."""
    x = torch.randn(2, *opened(folders, name).denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = opened(folders, name)
        expected = bare.denoiser(x, 0.5, **condition_of(bare))
        prior = opened(folders, name)
        policy = controlled(prior)
        null = torch.full((2,), NULL)
        assert torch.equal(policy(x, 0.5, labels={"ink": null}, **condition_of(prior)), expected)
        assert torch.equal(policy.prior(x, 0.5, **condition_of(prior)), expected)
        steered = policy(x, 0.5, labels={"ink": torch.tensor([1, 2])}, **condition_of(prior))
        assert (steered - expected).flatten(1).abs().amax(1).min() > 1e-3
        # a row's control is its own, in both halves of the guidance
        mixed = policy(x, 0.5, labels={"ink": torch.tensor([1, NULL])}, **condition_of(prior))
        assert_close(mixed, torch.stack([steered[0], expected[1]]))


@pytest.mark.parametrize("name", ["DiT", *TEXT])
def test_attention_is_pytorchs_own(folders, name, monkeypatch):
    """Of the bare network and of one with a control alike."""
    prior, called = opened(folders, name), []  # its prompts are encoded before the count
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, **options):
        called.append(1)
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    x = torch.randn(2, *prior.denoiser.shape)
    with torch.no_grad():
        prior.denoiser(x, 0.5, **condition_of(prior))
        bare = len(called)
        controlled(prior)(x, 0.5, labels={"ink": torch.tensor([0, 1])}, **condition_of(prior))
    assert bare > 0
    assert len(called) == 2 * bare


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


@pytest.mark.parametrize("name", BUILDERS)
def test_a_pipeline_is_inspected(folders, name):
    """What is said is what diffusers' own objects say."""
    prior, pipeline = opened(folders, name), folders[name][1]
    bare = sum(p.numel() for p in prior.denoiser.network.parameters())
    report = describe(prior)
    assert (report["family"], report["parameters"]) == (type(pipeline).__name__, bare)
    kinds = {"SD 2": "v_prediction", **dict.fromkeys(FLOWS, "flow")}
    assert report["prediction_type"] == kinds.get(name, "epsilon")
    assert report["schedule"] == ("RectifiedFlow" if kinds.get(name) == "flow" else "VariancePreserving")
    assert 0 < report["control_parameters"]
    assert report["step"]["memory_mb"]["activations"] > 0
    assert in_words(report).startswith("family       " + report["family"])


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
@pytest.mark.parametrize("name", TEXT)
def test_images_need_not_be_square(folders, name, size):
    """Nor of the size a family was trained on; latents and images are of the size asked for."""
    prior = Prior.from_pretrained(folders[name][0], size).with_prompts(PROMPTS)
    assert prior.denoiser.shape == (4, size[0] // 4, size[1] // 4)
    with torch.no_grad():
        images = prior.decode(prior.denoiser(torch.randn(2, *prior.denoiser.shape), 0.5, **condition_of(prior)))
    assert images.shape == (2, 3, *size)
    assert prior.encode(images).shape == (2, *prior.denoiser.shape)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("SD 1", (30, 32), "size 30×32: height and width must be multiples of 4"),
        ("Flux", (36, 32), "size 36×32: height and width must be multiples of 8"),
        ("PixArt-Sigma", (36, 32), "size 36×32: height and width must be multiples of 8"),
        ("AuraFlow", (36, 32), "size 36×32: height and width must be multiples of 8"),
        ("AuraFlow", (32, 56), "size 32×56: it has no positions beyond 48 pixels a side"),
        ("AuraFlow", None, "size 1024×1024: it has no positions beyond 48 pixels a side"),
        ("Z-Image", (36, 32), "size 36×32: height and width must be multiples of 8"),
        ("Z-Image", (72, 32), "size 72×32: it has no positions beyond 64 pixels a side"),
        ("Z-Image", None, "size 1024×1024: it has no positions beyond 64 pixels a side"),
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
    prior.codec.vae.decoder.register_forward_hook(lambda module, args, out: tiles.append(out.shape[2:]))
    z = torch.randn(1, *prior.denoiser.shape, requires_grad=True)
    images = prior.decode(z)
    assert images.shape == (1, 3, 64, 96)
    assert len(tiles) > 1
    images.sum().backward()
    assert z.grad.flatten(2).any(2).all()
    assert opened(folders, "DDPM").placed("cpu", tiling=True).latent is False


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


@pytest.mark.parametrize("name", ["DiT", *TEXT])
@torch.no_grad()
def test_without_a_condition_it_is_where_guidance_begins(folders, name):
    """f(∅) + g (f(c) − f(∅)) at two g says what f(∅) is; a guidance that is an input of the network has no ∅."""
    prior = opened(folders, name)
    x = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    if name == "Flux":
        assert prior.denoiser.null_call is None
        return
    if name == "DiT":
        expected = prior.denoiser(x, 0.5, c=torch.full((2,), prior.null))
    else:
        at = [prior.with_prompts(PROMPTS, g).denoiser(x, 0.5, c=torch.tensor([0, 1])) for g in (2.0, 3.0)]
        expected = 3 * at[0] - 2 * at[1]
    assert_close(prior.denoiser(x, 0.5), expected)
    assert not torch.equal(prior.denoiser(x, 0.5), prior.denoiser(x, 0.5, **condition_of(prior)))
