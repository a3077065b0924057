import pytest
import torch
from diffusers import DiTPipeline

from ctrl_diffusion.chain.noise import stream
from ctrl_diffusion.chain.paths import paths
from ctrl_diffusion.data.letters.rulers import CHARACTERS
from ctrl_diffusion.data.letters.sets import REAL, letters
from ctrl_diffusion.prior.prior import open_prior
from ctrl_diffusion.prior.source import LETTERS


@pytest.fixture(scope="module")
def prior():
    return open_prior("letters")


def test_the_letters_are_an_ordinary_pipeline_folder_of_half_precision(prior):
    pipeline = DiTPipeline.from_pretrained(LETTERS, vae=None)
    assert pipeline.transformer.config.num_embeds_ada_norm == len(CHARACTERS)
    assert sum(f.stat().st_size for f in LETTERS.rglob("*") if f.is_file()) <= 6_000_000
    assert {f.suffix for f in LETTERS.rglob("*") if f.is_file()} == {".json", ".safetensors"}
    assert {p.dtype for p in prior.denoiser.network.parameters()} == {torch.float32}


def test_a_class_is_called_as_its_letter(prior):
    assert prior.class_names == tuple(CHARACTERS)
    assert all(prior.number_of(letter) == i for i, letter in enumerate(CHARACTERS))
    assert prior.null == prior.classes == len(CHARACTERS)


def test_the_null_class_was_trained(prior):
    """Where all is noise the null class guesses the mean over letters: it is nearer to it than the classes are."""
    x_t = torch.randn(8, 1, 32, 32, generator=stream(0, "null"))
    mean = letters(REAL).x.mean(0, keepdim=True)
    with torch.no_grad():
        guess = prior.unconditional().denoiser(x_t, 0.99)
        of_class = torch.stack([prior.denoiser(x_t, 0.99, c=torch.full((8,), c)) for c in range(0, 62, 6)])
    assert (guess - mean).square().mean() < (of_class - mean).square().mean()


def test_samples_are_nearest_to_their_own_letter(prior):
    real = letters(REAL)
    means = torch.stack([real.x[real.c == c].mean(0) for c in range(len(CHARACTERS))]).flatten(1)
    c = torch.tensor([CHARACTERS.index(letter) for letter in "ABEHKMRTWZaegkmwy234"])
    times = prior.denoiser.times(10, 0.05, 2.0)
    x = paths(prior.denoiser, len(c), times, stream(0, "letters"), {"c": c}).x_0
    assert x.shape == (len(c), 1, 32, 32)
    assert (torch.cdist(x.flatten(1), means).argmin(1) == c).float().mean() >= 0.6  # one in 62 by chance
