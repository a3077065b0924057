import json
import shutil

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel

from ctrl_diffusion.control.lora import LoRAControl
from ctrl_diffusion.control.policy import Policy
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS


def test_the_embedded_prior_is_an_ordinary_pipeline_folder():
    pipeline = DiTPipeline.from_pretrained(DIGITS, vae=None)
    assert not pipeline.scheduler.config.clip_sample
    assert sum(f.stat().st_size for f in DIGITS.rglob("*") if f.is_file()) <= 4_000_000
    assert {f.suffix for f in DIGITS.rglob("*") if f.is_file()} == {".json", ".safetensors"}


def test_the_denoiser_reads_the_network_as_diffusers_does(digits):
    pipeline = DiTPipeline.from_pretrained(DIGITS, vae=None)
    x_t, c = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 9, 10])
    k = torch.tensor([5, 300, 700, 999])
    with torch.no_grad():
        v = pipeline.transformer(x_t, k, class_labels=c).sample
        alpha_bar = pipeline.scheduler.alphas_cumprod[k].view(-1, 1, 1, 1)
        expected = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v
        actual = digits.denoiser((x_t), (k.double() + 1) / 1000, c=c)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (digits.classes, digits.denoiser.shape) == (10, (1, 8, 8))


def test_a_prior_without_its_classes_asks_for_the_null_class(digits):
    """What it knows without c is what it was trained to know: bit for bit the null class of diffusers' network."""
    x_t = torch.randn(4, 1, 8, 8)
    bare = digits.unconditional()
    assert (bare.classes, bare.class_names, bare.denoiser.shape) == (None, (), (1, 8, 8))
    with torch.no_grad():
        assert torch.equal(bare.denoiser(x_t, 0.4), digits.denoiser(x_t, 0.4, c=torch.full((4,), 10)))
    with pytest.raises(ValueError, match="is unconditional already"):
        bare.unconditional()


def unet(**options):
    torch.manual_seed(0)
    settings = {
        "sample_size": (8, 6), "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "layers_per_block": 1, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DModel(**{**settings, **options}).eval()


PIPELINES = {"DDPM": (DDPMPipeline, DDPMScheduler), "DDIM": (DDIMPipeline, DDIMScheduler)}


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_unet_pipeline_is_read_as_its_scheduler_reads_it(tmp_path, kind, prediction):
    pipeline, scheduler = PIPELINES[kind]
    pipeline(unet(), scheduler(prediction_type=prediction, clip_sample=False)).save_pretrained(tmp_path)
    prior = Prior.from_pretrained(tmp_path)
    assert (prior.classes, prior.denoiser.shape, prior.class_names) == (None, (3, 8, 6), ())
    loaded = pipeline.from_pretrained(tmp_path)
    x_t, k = torch.randn(2, 3, 8, 6), 400
    with torch.no_grad():
        predicted = loaded.unet(x_t, k).sample
        loaded.scheduler.set_timesteps(1000)
        expected = loaded.scheduler.step(predicted, k, x_t).pred_original_sample
        actual = prior.denoiser(x_t, (k + 1) / 1000)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_null_and_strength_0_are_the_pipelines_own_network(tmp_path):
    DDPMPipeline(unet(), DDPMScheduler(prediction_type="sample", clip_sample=False)).save_pretrained(tmp_path)
    network, prior = DDPMPipeline.from_pretrained(tmp_path).unet.eval(), Prior.from_pretrained(tmp_path).denoiser
    control = LoRAControl("y", ("a", "b"), prior, rank=2)
    with torch.no_grad():
        for parameter in sum(control.parameter_groups().values(), []):
            parameter.add_(0.5)
        policy, x_t = Policy(prior, control), torch.randn(4, 3, 8, 6)
        bare = network(x_t, 300).sample
        y = torch.tensor([0, 1, 0, 1])
        assert not torch.isclose(policy(x_t, 0.301, labels={"y": y}), bare, atol=1e-3).flatten(1).all(1).any()
        assert torch.equal(policy(x_t, 0.301, labels={"y": torch.full((4,), -1)}), bare)
        assert torch.equal(policy(x_t, 0.301, labels={"y": y}, strength=0.0), bare)


def test_learned_variance_is_dropped_and_classes_are_known(tmp_path):
    DDPMPipeline(unet(out_channels=6, num_class_embeds=4), DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    prior = Prior.from_pretrained(tmp_path)
    assert (prior.classes, prior.names) == (4, {"0": 0, "1": 1, "2": 2, "3": 3})
    assert prior.denoiser(torch.randn(2, 3, 8, 6), 0.5, c=torch.tensor([0, 3])).shape == (2, 3, 8, 6)
    with pytest.raises(ValueError, match="was not trained with a class for none"):
        prior.unconditional()


def test_a_noise_model_begins_at_a_finite_snr(tmp_path):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    DDPMPipeline(unet(), scheduler).save_pretrained(tmp_path / "a")
    prior = Prior.from_pretrained(tmp_path / "a").denoiser
    times = prior.times(10, 0.1)
    before, after = (float(prior.schedule(times[0] + d)[0]) for d in (-1e-3, 1e-3))
    assert before > 0.005 > after
    DDPMPipeline(unet(), DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path / "b")
    assert Prior.from_pretrained(tmp_path / "b").denoiser.times(10, 0.1)[0] == 1.0


def test_names_of_classes(tmp_path):
    folder = changed(tmp_path / "a", "model_index.json", id2label={"0": "nought, zero", "1": "one"})
    prior = Prior.from_pretrained(folder)
    assert (prior.names["zero"], prior.names["nought"], prior.names["0"], prior.names["one"]) == (0, 0, 0, 1)
    assert prior.class_names[:3] == ("nought", "one", "2")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "cannot be loaded: it lacks its vae and text_encoder and",
        ),
        ("model_index.json", {"_class_name": "KandinskyPipeline"}, "holds a KandinskyPipeline; supported: DDPMPipel"),
        ("model_index.json", {"_class_name": None}, "holds a None; supported"),
        ("model_index.json", {"scheduler": None}, "cannot be loaded: it lacks its scheduler"),
        ("model_index.json", {"scheduler": ["diffusers", "NoScheduler"]}, "cannot be loaded"),
        ("model_index.json", {"scheduler": ["diffusers", "ScoreSdeVeScheduler"]}, "no discrete noise schedule"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
    ],
)
def test_what_is_not_supported_is_said_in_one_line(tmp_path, part, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        Prior.from_pretrained(changed(tmp_path / "a", part, **values))
    assert "\n" not in str(caught.value)


def test_what_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        Prior.from_pretrained(tmp_path / "missing")
    folder = changed(tmp_path / "a", "model_index.json")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Prior.from_pretrained(folder)


def changed(folder, part, **values):
    """A copy of the embedded prior with one config changed."""
    shutil.copytree(DIGITS, folder)
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_clipping_is_honoured_and_said(tmp_path):
    with pytest.warns(UserWarning, match="clips"):
        prior = Prior.from_pretrained(changed(tmp_path / "a", "scheduler/scheduler_config.json", clip_sample=True))
    assert prior.denoiser.clip == 1.0
