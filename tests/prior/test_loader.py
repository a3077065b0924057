"""A pipeline is loaded from a folder or the hub, or one line says why not."""

import shutil

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler

from ctrl_diffusion.prior.prior import Prior
from tests.prior.priors import edit, truncate


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
        actual, expected = (Prior.from_pretrained(f).denoiser(x, 0.5) for f in (tmp_path / "early", folders["DDPM"][0]))
    assert torch.equal(actual, expected)


def test_a_flow_is_not_read_from_a_scheduler_of_diffusion(folders, tmp_path):
    shutil.copytree(folders["SD 3"][0], tmp_path / "broken")
    edit(tmp_path / "broken" / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    DDIMScheduler().save_pretrained(tmp_path / "broken" / "scheduler")
    with pytest.raises(ValueError, match="it is a flow, whose schedule is read from FlowMatchEuler.*not DDIMScheduler"):
        Prior.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "vae"), "cannot be loaded"),
        (lambda folder: edit(folder / "model_index.json", text_encoder=[None, None]), "it lacks its text_encoder"),
        (lambda folder: edit(folder / "scheduler/scheduler_config.json", prediction_type="karras"), "prediction"),
        (lambda folder: edit(folder / "scheduler/scheduler_config.json", prediction_type="flow"), "known: epsilon"),
        (lambda folder: edit(folder / "model_index.json", _class_name=["pipeline", "Mine"]), "its own class"),
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
    options = {}
    answer = str(folders["SD 1"][0])
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda name, **how: options.update(how) or answer)
    assert Prior.from_pretrained("someone/something").pipeline == "StableDiffusionPipeline"
    assert options["use_safetensors"] is True
    monkeypatch.undo()
    with pytest.raises(ValueError, match="someone/something is no folder here, and the hub does not give it") as caught:
        Prior.from_pretrained("someone/something")
    assert "\n" not in str(caught.value)
