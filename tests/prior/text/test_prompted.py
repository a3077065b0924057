"""Prompts that are kept in files are those that are kept in memory, however many there are."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.text.encoded import SHARD
from tests.prior.priors import SIZE, assert_close

FAMILIES = ["SD 1", "SDXL", "SD 3", "Flux", "PixArt-Sigma", "AuraFlow", "Z-Image"]
PROMPTS = [f"{'ab' * (i % 6)} {chr(97 + i % 26)} {chr(97 + i // 26)}" for i in range(2 * SHARD + 5)]
C = torch.tensor([3, SHARD + 9, 3, 2 * SHARD + 4])  # of three shards, one twice


@pytest.fixture(scope="module")
def priors(folders):
    """Of every family a prior without prompts."""
    return {name: Prior.from_pretrained(folders[name][0], SIZE.get(name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_prompt_looked_up_is_the_prompt_encoded_at_once(priors, tmp_path, name):
    """To the bit what a batch of that prompt alone gives, whatever it is drawn with; in a batch of all of them the
    encoders' sums of some tens of terms may be ordered otherwise: 1e-5 is a hundred roundings of a number near one."""
    text = priors[name].text
    prior, alone = (priors[name].with_prompts(PROMPTS, cache=tmp_path / cache) for cache in ("together", "alone"))
    eager = priors[name].with_prompts([*PROMPTS[:4], PROMPTS[C[1]], PROMPTS[C[3]]])
    same = torch.tensor([3, 4, 3, 5])
    assert not list(tmp_path.iterdir())  # nothing is drawn yet
    x = torch.randn(len(C), *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    predicted = prior.denoiser(x, 0.5, c=C)
    assert_close(predicted, eager.denoiser(x, 0.5, c=same))
    assert torch.equal(prior.denoiser(x, 0.5, c=C), predicted)
    for number in C.unique():
        alone.denoiser(x[:1], 0.5, c=number[None])
    for i, place in zip(C.tolist(), same.tolist(), strict=True):
        expected = text.encode([PROMPTS[i]], None)[0]
        for call in (prior.denoiser.call, alone.denoiser.call):
            with safe_open(call.store.path(i // SHARD), "pt") as file:
                assert all(torch.equal(file.get_tensor(key)[i % SHARD], row[0]) for key, row in expected.items())
        for key, row in expected.items():
            torch.testing.assert_close(eager.denoiser.call.rows[key][place], row[0], rtol=0, atol=1e-5)
    assert len(list(prior.denoiser.call.store.folder.iterdir())) == 3
    means = torch.cat([text.encode([PROMPTS[i]], None)[0]["encoder_hidden_states"].mean(1) for i in C.tolist()])
    for embedding in (prior.embedding_of(C), eager.embedding_of(same)):
        assert embedding.dtype == torch.float32
        torch.testing.assert_close(embedding, means, rtol=0, atol=1e-5)
    size = sum(row.nbytes for row in expected.values())
    assert prior.prompt_storage == (len(PROMPTS), size, len(PROMPTS) * size)
    assert eager.prompt_storage == (6, size, 6 * size)


@torch.no_grad()
def test_a_new_prompt_is_numbered_after_those_in_files(priors, tmp_path):
    prior = priors["SD 1"].with_prompts(PROMPTS, guidance=3.0, cache=tmp_path)
    memory = priors["SD 1"].with_prompts(["two", "a seven"], guidance=3.0)
    assert len(prior.class_names) == len(PROMPTS)
    assert [prior.number_of(name) for name in ("two", "a seven", "two", PROMPTS[7])] == [517, 518, 517, 7]
    assert prior.class_names[-2:] == ("two", "a seven")
    x = torch.randn(3, *prior.denoiser.shape)
    predicted = prior.denoiser(x, 0.5, c=torch.tensor([518, 7, 517]))
    assert_close(predicted[[0, 2]], memory.denoiser(x[[0, 2]], 0.5, c=torch.tensor([1, 0])))
    assert_close(prior.denoiser(x[:1], 0.5, c=torch.tensor([518])), predicted[:1])
    with pytest.raises(ValueError, match=r"c must lie in 0 … 518, got 7 … 519"):
        prior.denoiser(x, 0.5, c=torch.tensor([518, 7, 519]))
    embeddings = prior.embedding_of(torch.tensor([518, 517])), memory.embedding_of(torch.tensor([1, 0]))
    torch.testing.assert_close(*embeddings, rtol=0, atol=1e-5)
    assert prior.prompt_storage.prompts == 519


@torch.no_grad()
def test_the_bytes_of_a_prompt_do_not_depend_on_the_precision_of_the_network(priors, tmp_path):
    """The text encoders compute in their own, also where a prompt is looked up from inside of autocast."""
    files = []
    for precision in (None, torch.bfloat16):
        prior = priors["SD 1"].with_prompts(PROMPTS, cache=tmp_path / str(precision))
        prior.denoiser.set_precision(precision)
        prior.denoiser(torch.randn(1, *prior.denoiser.shape), 0.5, c=torch.tensor([3]))
        files.append(prior.denoiser.call.store.path(0).read_bytes())
    assert files[0] == files[1]


def test_what_was_looked_up_in_inference_mode_may_serve_a_gradient(priors, tmp_path):
    prior = priors["SD 1"].with_prompts(PROMPTS, cache=tmp_path)
    x = torch.randn(4, *prior.denoiser.shape)
    with torch.inference_mode():
        prior.denoiser.call.look_up(C, x)
    assert not any(row.is_inference() for row in prior.denoiser.call.look_up(C, x).values())


@torch.no_grad()
def test_runs_share_a_store_only_where_all_is_the_same(priors, tmp_path):
    """Guidance and negative prompt change no row of a prompt; the negative is encoded each time, and counts."""

    def kept(name="SD 1", prompts=PROMPTS, **options):
        return priors[name].with_prompts(prompts, cache=tmp_path, **options).denoiser

    def folder(*arguments, **options):
        return kept(*arguments, **options).call.store.folder

    first = folder()
    assert first.parent == tmp_path
    assert first == folder(guidance=1.0) == folder(negative="two")
    assert len({first, folder("SDXL"), folder("SD 3"), folder("SD 1", PROMPTS[::-1]), folder("SD 1", PROMPTS[1:])}) == 5
    x = torch.randn(4, 4, 8, 8)
    plain, negative = (kept(negative=text)(x, 0.5, c=C) for text in ("", "two"))
    assert not torch.equal(plain, negative)


def test_what_cannot_be_kept_is_refused(priors, digits, tmp_path):
    text = replace(priors["SD 1"].text, encoders={})
    with pytest.raises(ValueError, match="its family names no text encoders to know files by. Leave the cache out"):
        replace(priors["SD 1"], text=text).with_prompts(PROMPTS, cache=tmp_path)
    with pytest.raises(ValueError, match=r"has no prompts. Number some with with_prompts"):
        digits.embedding_of(torch.tensor([0]))


def send_memory(pipe, text_prior, prompts, cache):
    """Send the kilobytes after lookups of a hundred prompts: of a hundred, once more, and of all."""
    used = []
    for count in (100, 100, len(prompts)):
        prior = text_prior.with_prompts(prompts[:count], guidance=1.0, cache=cache)
        for c in torch.arange(0, count, count // 100).split(10):
            prior.denoiser(torch.zeros(10, *prior.denoiser.shape), 0.5, c=c)
        status = Path("/proc/self/status").read_text().split()
        used.append(int(status[status.index("RssAnon:") + 1]))
    pipe.send(used)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts anonymous memory apart")
def test_a_hundred_thousand_prompts_take_the_memory_of_a_hundred(priors, tmp_path):
    """Within 5 %, which their names and numbers stay below; their rows alone would take 100 MB.

    In a process of its own, a fork without the seconds of its imports.
    """
    prompts = [f"a photo of number {i}" for i in range(100_000)]
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=send_memory, args=(sender, priors["SD 1"], prompts, tmp_path))
    process.start()
    try:
        assert receiver.poll(timeout=300)
        _, few, many = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert many < 1.05 * few
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1 + 100  # every thousandth prompt has a shard of its own
