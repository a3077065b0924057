"""`ctrl certify`: on the digits, on a text model, beside a run, and what is refused before anything is sampled."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from ctrl_diffusion.commands.jobs import certify as job
from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.prior.source import DIGITS


def lora_on(network, path, scale):
    """A LoRA file of rank 2 with PEFT's names on the queries and values of a network."""
    draw, tensors = torch.Generator().manual_seed(0), {}
    for name, module in network.named_modules():
        if name.endswith(("attn1.to_q", "attn1.to_v")):
            out, inner = module.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, inner, generator=draw) / inner**0.5
            tensors[f"transformer.{name}.lora_B.weight"] = scale * torch.randn(out, 2, generator=draw)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Of nothing and of something on the digits, and on a network of another width."""
    folder, network = tmp_path_factory.mktemp("loras"), Prior.from_pretrained(DIGITS).denoiser.network
    for name, scale in (("zeros", 0.0), ("some", 0.1)):
        lora_on(network, folder / f"{name}.safetensors", scale)
    stem = "transformer.transformer_blocks.0.attn1.to_q.lora"
    other = {f"{stem}_A.weight": torch.ones(2, 64), f"{stem}_B.weight": torch.ones(64, 2)}
    save_file(other, folder / "other.safetensors")
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)}
    save_file(text, folder / "text.safetensors")
    (folder / "lora.ckpt").write_bytes(b"a pickle")
    return folder


SHORT = ("--steps", 3, "-n", 8, "--class", 3, "--class", 5)


def test_a_lora_of_zeros_is_said_to_go_nowhere(ctrl_here, loras, tmp_path):
    done = ctrl_here("certify", "digits", "--lora", loras / "zeros.safetensors", "--out", tmp_path / "out", *SHORT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "KL from the base: 0 ± 0 nats a sample.", f"report: {tmp_path / 'out' / 'report.html'}",
    ]  # fmt: skip
    figures = json.loads((tmp_path / "out" / "certify.json").read_text())
    assert [row["kl_nats"] for row in figures["kl_per_step"]] == [0.0] * 3
    assert "aim" not in figures
    assert "names no alpha" in done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"certify.json", "report.html", "grid.png", "steps.png", "prompts.png"}


@pytest.mark.filterwarnings("ignore:log Z is not certified")  # of ten samples
def test_a_lora_is_held_against_a_run_and_its_classifier(ctrl_here, loras, quick_run, tmp_path):
    """The run's chain, p̂ and γ, and the run beside it at a strength with the same KL; the same bytes by the seed."""
    command = ("certify", "digits", "--lora", loras / "some.safetensors", "--run", quick_run, "--value", "4", "-n", 20)
    command = (*command, "--class", 3, "--class", 5)
    for name in ("a", "b"):
        done = ctrl_here(*command, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "a" / "certify.json").read_text())
    assert (tmp_path / "a" / "certify.json").read_bytes() == (tmp_path / "b" / "certify.json").read_bytes()
    assert figures["aim"] == {"kind": "classifier", "name": "ink", "value": "4", "gamma": 1.0}
    assert figures["kl_nats"] > 0
    assert figures["chain"]["steps"] == 6
    assert len(figures["kl_per_prompt"]) == 2
    certificate = figures["certificate"]
    assert len(certificate["pairs"]["objective_nats"]) == 2
    # J is the mean reward less log p_g/p_pre, of the same expectation as the KL and of variance 2 KL on a path
    noise = (2 * figures["kl_nats"] / figures["samples"]) ** 0.5
    assert abs(figures["score"] - figures["kl_nats"] - certificate["objective_nats"]) < 4 * noise
    rows = figures["run"]["rows"]
    assert rows[-1]["strength"] == 1.0
    assert "The run at" in done.stdout
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Against p̂(ink = 4 | x)" in page
    assert page.count("data:image/png;base64,") == 3


@pytest.mark.filterwarnings("ignore:log Z is not certified")  # of ten samples
def test_a_rule_rates_the_images(ctrl_here, loras, tmp_path):
    command = ("certify", "digits", "--lora", loras / "some.safetensors", "--out", tmp_path / "out", *SHORT)
    rule = "ctrl_diffusion.data.rules:jpeg_kilobytes"
    done = ctrl_here(*command, "--rule", rule, "--gamma", 2)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "certify.json").read_text())
    assert figures["aim"]["kind"] == "rule"
    assert figures["prior_score"] > 0.1  # no JPEG is smaller than its tables
    assert "rating jpeg_kilobytes" in done.stdout


def test_a_text_model_is_certified_on_its_prompts(ctrl_here, finished, tmp_path):
    """By the prompts of a file, and those of --prompt."""
    base = finished.parent / "prior"
    network = Prior.from_pretrained(base).denoiser.network
    path = lora_on(network, tmp_path / "lora.safetensors", 0.3)
    (tmp_path / "prompts.txt").write_text("a seven\na nine\n")
    given = {"a": ("--prompts", tmp_path / "prompts.txt"), "b": ("--prompt", "a seven", "--prompt", "a nine")}
    for name, options in given.items():
        done = ctrl_here(
            "certify", base, "--lora", path, "--out", tmp_path / name, "--steps", 2, "-n", 4, "--guidance", 3, *options
        )
        assert done.returncode == 0, done.stderr
    a, b = (json.loads((tmp_path / name / "certify.json").read_text()) for name in given)
    assert a == b
    assert a["chain"]["guidance"] == 3
    assert [row["name"] for row in a["kl_per_prompt"]] == ["c = a seven", "c = a nine"]
    assert all(row["kl_nats"] > 0 for row in a["kl_per_prompt"])


RULE = ("--rule", "ctrl_diffusion.data.rules:jpeg_kilobytes")
BAD = {
    "text encoder": (["--lora", "text.safetensors"], "also changes a text encoder"),
    "another base": (["--lora", "other.safetensors"], "it was made for another base"),
    "pickle": (["--lora", "lora.ckpt"], "is a pickle"),
    "missing": (["--lora", "none.safetensors"], "there is no such file"),
    "two rewards": ([*RULE, "--classifier", "CLASSIFIER", "--value", "4"], "--rule and --classifier are two rewards"),
    "γ of nothing": (["--gamma", 2], "--gamma is the weight of a reward"),
    "γ of 0": ([*RULE, "--gamma", 0], "--gamma 0: must be above 0"),
    "γ below 0": ([*RULE, "--gamma", -1], "--gamma -1: must be above 0"),
    "no value": (["--classifier", "CLASSIFIER"], "--value is missing"),
    "value of nothing": (["--value", 4], "Name its folder with --classifier"),
    "another value": (["--classifier", "CLASSIFIER", "--value", "blue"], "--value: ink must be one of 1, 2, 3, 4"),
    "no rule": (["--rule", "nowhere:rule"], "the rule nowhere:rule: ModuleNotFoundError"),
    "a failing rule": (["--rule", "os.path:join"], "the rule os.path:join failed on an image"),
    "another class": (["--class", "elephant"], "--class must be one of the prior's 10 classes"),
    "prompts": (["--prompt", "a cat"], "this base is given no text"),
    "no pipeline": (["PIPELINE", "nowhere"], "nowhere"),
    "steps of a run": (["--run", "RUN", "--value", "4", "--steps", 3], "--steps is that of the run"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_anything_is_sampled(ctrl_here, loras, quick_run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(job, "certify_lora", lambda *_: pytest.fail("sampled"))
    options, reason = BAD[name]
    options = list(options)
    pipeline = options.pop() if options[0] == "PIPELINE" else "digits"
    options = [] if options == ["PIPELINE"] else options
    lora = loras / (options.pop(1) if options[:1] == ["--lora"] else "some.safetensors")
    options = [] if options == ["--lora"] else options
    folders = {"CLASSIFIER": quick_run / "classifier", "RUN": quick_run}
    options = [folders.get(option, option) for option in options]
    done = ctrl_here("certify", pipeline, "--lora", lora, "--out", tmp_path / "out", *options)
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, len([line for line in lines if line.startswith("ctrl: ")])) == (2, 1), done.stderr
    assert lines[-1].startswith("ctrl: ")
    assert reason in lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_classifier_of_other_images_is_refused(ctrl_here, finished, quick_run, tmp_path):
    base = finished.parent / "prior"
    path = lora_on(Prior.from_pretrained(base).denoiser.network, tmp_path / "lora.safetensors", 0.3)
    options = ("--prompt", "a seven", "--classifier", quick_run / "classifier", "--value", "4")
    done = ctrl_here("certify", base, "--lora", path, "--out", tmp_path / "out", *options)
    assert done.returncode == 2
    assert "takes images of 1 × 8 × 8 and the base makes 3 × 32 × 32" in done.stderr
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_kept(ctrl_here, loras, tmp_path):
    shutil.copy(loras / "some.safetensors", tmp_path)
    done = ctrl_here(
        "certify", "digits", "--lora", loras / "some.safetensors", "--out", tmp_path, "--overwrite", *SHORT
    )
    assert done.returncode == 2
    assert "no certify.json of ours to overwrite" in done.stderr
