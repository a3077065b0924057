import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel

from ctrl_diffusion import assets
from ctrl_diffusion.pretrained import Prior


def test_the_embedded_prior_is_an_ordinary_pipeline_folder():
    pipeline = DiTPipeline.from_pretrained(assets.DIGITS, vae=None)
    assert not pipeline.scheduler.config.clip_sample
    assert sum(f.stat().st_size for f in assets.DIGITS.rglob("*") if f.is_file()) <= 4_000_000
    assert {f.suffix for f in assets.DIGITS.rglob("*") if f.is_file()} == {".json", ".safetensors"}


def test_the_denoiser_reads_the_network_as_diffusers_does(digits):
    pipeline = DiTPipeline.from_pretrained(assets.DIGITS, vae=None)
    x_t, c = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 9, 10])
    k = torch.tensor([5, 300, 700, 999])
    with torch.no_grad():
        v = pipeline.transformer(x_t, k, class_labels=c).sample
        alpha_bar = pipeline.scheduler.alphas_cumprod[k].view(-1, 1, 1, 1)
        expected = alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v
        found = digits.denoiser((x_t), (k.double() + 1) / 1000, c=c)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (digits.classes, digits.denoiser.shape) == (10, (1, 8, 8))


def test_what_is_no_prior_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        Prior.from_pretrained(tmp_path / "missing")
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DDPMPipeline; supported: DiTPipeline"):
        Prior.from_pretrained(tmp_path)


def changed(folder, part, **values):
    """A copy of the embedded prior with one config changed."""
    shutil.copytree(assets.DIGITS, folder)
    path = folder / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def test_a_latent_model_is_not_taken_for_pixels(tmp_path):
    with pytest.raises(ValueError, match="has a VAE"):
        Prior.from_pretrained(changed(tmp_path / "a", "model_index.json", vae=["diffusers", "AutoencoderKL"]))


def test_clipping_is_honoured_and_said(tmp_path):
    with pytest.warns(UserWarning, match="clips"):
        prior = Prior.from_pretrained(changed(tmp_path / "a", "scheduler/scheduler_config.json", clip_sample=True))
    assert prior.denoiser.clip == 1.0
    with pytest.raises(ValueError, match="thresholding"):
        Prior.from_pretrained(changed(tmp_path / "b", "scheduler/scheduler_config.json", thresholding=True))
