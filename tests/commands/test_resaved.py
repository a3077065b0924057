"""An exported pipeline is saved, converted and called as any pipeline of diffusers is."""

import json
import os
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ctrl_diffusion.commands.jobs.export import export
from ctrl_diffusion.data.labels import LabelSpace
from ctrl_diffusion.run.pipeline import ControlledPipeline
from tests.commands.families import run_on
from tests.commands.test_export import opened

# where the package cannot be imported: load, draw, save as it is and in half the size, before and after the first call,
# and draw again from every folder
SAVED = """
import sys
sys.modules["ctrl_diffusion"] = None
import torch
from diffusers import DiffusionPipeline
out, call, root, results = sys.argv[1], eval(sys.argv[2]), sys.argv[3], {}

def opened(folder, **options):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)

def draw(pipe):
    return pipe(**call, output_type="pt", generator=torch.Generator().manual_seed(3)).images.float()

pipe = opened(out)
pipe.save_pretrained(f"{root}/before")
results["first"] = draw(pipe)
pipe.save_pretrained(f"{root}/after")
results["unchanged"] = draw(pipe)
pipe.to(torch.bfloat16)
results["converted"] = draw(pipe)
pipe.save_pretrained(f"{root}/half")
for name in ("before", "after", "half"):
    results[name] = draw(opened(f"{root}/{name}"))
    opened(f"{root}/{name}").save_pretrained(f"{root}/{name}-again")
    results[f"{name}-again"] = draw(opened(f"{root}/{name}-again"))
results["by file"] = draw(opened(f"{root}/after", custom_pipeline="pipeline"))
results["kept half"] = draw(opened(f"{root}/half", torch_dtype=torch.bfloat16))
null = {**call, "controls": None}
results["null"] = opened(out)(**null, output_type="pt", generator=torch.Generator().manual_seed(3)).images
torch.save(results, f"{root}/results.pt")
"""
CALLS = {
    "DDPM": {"num_images_per_prompt": 2},
    "SD 1": {"prompt": "a nine", "num_images_per_prompt": 2},
    "DiT": {"class_labels": [3, 0]},
    "Flux": {"prompt": "a nine", "num_images_per_prompt": 2},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("DiT", "Flux") else ()) for n in CALLS]
)
def test_an_exported_pipeline_is_saved_again_with_controls_and_code(finished, tmp_path, name):
    (run, _), out = run_on(name, finished, tmp_path), tmp_path / "out"
    export(run, out)
    call = {**CALLS[name], "controls": {"dark": "yes"}}
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", SAVED, str(out), repr(call), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    drawn = torch.load(tmp_path / "results.pt")
    meant = drawn["first"] - drawn["null"]
    for key in ("unchanged", "before", "after", "before-again", "after-again", "by file"):
        assert torch.equal(drawn[key], drawn["first"]), key
    # what a control does would be off by all of itself, by 1, if it were lost. Weights of eight bits are off by 2⁻⁹ of
    # themselves; where activations have eight bits too, effects are alike to a cosine of 0.9, as in test_export
    for key, most in {"half": 0.1, "half-again": 0.1, "converted": 0.45, "kept half": 0.45}.items():
        assert (drawn[key] - drawn["first"]).norm() < most * meant.norm(), key
    for folder in ("before", "after", "half"):
        for file in (path for path in out.rglob("*") if path.suffix in (".py", ".safetensors", ".md", ".png")):
            copy = tmp_path / folder / file.relative_to(out)
            assert copy.is_file(), copy
            if file.suffix == ".safetensors":
                assert load_file(copy).keys() == load_file(file).keys(), copy
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / key).glob("*/diffusion*.safetensors"))
        for key in ("after", "half")
    ]
    assert sizes[1] < 0.6 * sizes[0], "two bytes for four, and a header"


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """Folders of exported pipelines by family."""
    root = tmp_path_factory.mktemp("exported")

    def made(name):
        out = root / name / "out"
        if not out.is_dir():
            run, _ = run_on(name, finished, root / name)
            export(run, out)
        return out

    return made


@pytest.fixture(scope="module")
def pipe(exported):
    """One of a text model, whose single control is dark: no or yes."""
    return opened(exported("SD 1"))


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def test_each_generator_of_a_list_draws_what_it_draws_alone(pipe):
    """But for the last bits, which change with the number of rows in a batch: 3 steps of float32 rounding."""
    options = {"controls": {"dark": "yes"}, "output_type": "pt"}
    both = pipe(["two", "a nine"], generator=seeds(3, 4), **options).images
    for i, (prompt, seed) in enumerate((("two", 3), ("a nine", 4))):
        (alone,) = pipe(prompt, generator=seeds(seed)[0], **options).images
        torch.testing.assert_close(both[i], alone, rtol=0, atol=1e-4)
        (listed,) = pipe(prompt, generator=seeds(seed), **options).images
        assert torch.equal(listed, alone)
    assert (both[0] - both[1]).abs().max() > 1e-2
    several = pipe("two", num_images_per_prompt=2, generator=tuple(seeds(3, 3)), **options).images
    torch.testing.assert_close(several[0], several[1], rtol=0, atol=1e-4)


def test_of_a_single_control_the_value_will_do(pipe):
    named, bare = (
        pipe("two", controls=y, output_type="pt", generator=seeds(3)[0]).images for y in ({"dark": "yes"}, "yes")
    )
    assert torch.equal(named, bare)


def test_a_value_may_be_called_as_its_control(pipe, monkeypatch):
    monkeypatch.setattr(pipe.policy.controls["dark"], "space", LabelSpace(("light", "dark")))
    named, bare = (
        pipe("two", controls=y, output_type="pt", generator=seeds(3)[0]).images for y in ({"dark": "dark"}, "dark")
    )
    assert torch.equal(named, bare)


def test_images_of_every_output_type_are_the_same(pipe):
    drawn = {kind: pipe("two", generator=seeds(3)[0], output_type=kind).images for kind in ("pil", "np", "pt")}
    assert np.array_equal(drawn["np"][0], drawn["pt"][0].permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(drawn["pil"][0]), (drawn["np"][0] * 255).round().astype("uint8"))
    (images,) = pipe("two", generator=seeds(3)[0], output_type="np", return_dict=False)
    assert np.array_equal(images, drawn["np"])


@pytest.mark.parametrize("labels", [torch.tensor([3, 0]), np.array([3, 0]), (3, "0")])
def test_classes_come_as_numbers_of_any_kind(exported, labels):
    pipe = opened_alone(exported("DiT"))
    drawn = [pipe(class_labels=c, output_type="pt", generator=seeds(3)[0]).images for c in (labels, [3, 0])]
    assert torch.equal(*drawn)


def opened_alone(out):
    """A pipeline of a model on pixels, as diffusers loads its parts."""
    index = json.loads((out / "model_index.json").read_text())
    parts = {
        name: getattr(diffusers, index[name][1]).from_pretrained(out / name)
        for name in ("scheduler", "unet", "transformer", "vae")
        if index.get(name)
    }
    pipe = ControlledPipeline(**parts, base=index["base"], chain=index["chain"], id2label=index["id2label"])
    pipe.register_to_config(_name_or_path=str(out))
    return pipe


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"controls": "dark"}, "has the control dark. Give a value by name, such as {'dark': 'yes'}"),
        ({"controls": ["yes"]}, "controls=['yes']: this pipeline has the control dark"),
        ({"controls": "maybe"}, "dark must be one of no, yes, got 'maybe'"),
        ({"controls": {"dark": None}}, "dark must be one of no, yes, got 'None'"),
        ({"controls": {"dark": ["no", "yes"]}}, "dark must be one of no, yes, got "),
        ({"controls": {"bright": "yes"}}, "unknown control 'bright'; this pipeline has: dark"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number from 1, got 0"),
        ({"num_images_per_prompt": 2.5}, "num_images_per_prompt must be a whole number from 1, got 2.5"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1, got 0"),
        ({"num_inference_steps": 5000}, "fewer than 5000 distinct times"),
        ({"control_strength": float("nan")}, "control_strength must be a number, got nan"),
        ({"control_strength": "1"}, "control_strength must be a number, got '1'"),
        ({"output_type": "latent"}, "output_type must be one of pil, np, pt, got 'latent'"),
        ({"generator": 3}, "generator must be a torch.Generator, or a list of them, got 3"),
        ({"generator": [3]}, "generator must be a torch.Generator, or a list of them, got [3]"),
        ({"generator": []}, "generator: a list has one for each image; got 0, for 1 images"),
        ({"generator": seeds(1, 2, 3)}, "generator: a list has one for each image; got 3, for 1 images"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None, "class_labels": 3}, "this model takes a prompt"),
    ],
)  # fmt: skip
def test_a_call_that_means_nothing_is_one_line(pipe, wrong, line):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        pipe(**({"prompt": "two"} | wrong))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"])
def test_parts_cannot_be_offloaded(pipe, how):
    with pytest.raises(ValueError, match="a control changes the network's weights where they are"):
        getattr(pipe, how)()


def test_controls_keep_their_precision_where_the_model_is_converted(exported):
    pipe = opened(exported("SD 1"))
    draw = {"controls": "yes", "output_type": "pt"}
    before = pipe("two", generator=seeds(3)[0], **draw).images
    weights = [p.clone() for p in pipe.policy.snapshot()]
    assert pipe.to(torch.float16) is pipe
    assert pipe.dtype == torch.float16
    assert all(map(torch.equal, weights, pipe.policy.snapshot()))
    after = pipe("two", generator=seeds(3)[0], **draw).images
    assert after.dtype == before.dtype
    assert 0 < (after - before).abs().max() < 0.05, "weights of eleven bits; a picture lies in [0, 1]"


def test_without_its_folder_nothing_is_saved(exported, tmp_path):
    pipe = opened(exported("SD 1"))
    pipe.register_to_config(_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"has no controls/ to save\. Bring it back"):
        pipe.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_it_is_saved_over_itself(exported, tmp_path):
    out = tmp_path / "SD 1" / "out"
    shutil.copytree(exported("SD 1").parent, out.parent)
    before = {path: path.read_bytes() for path in out.rglob("*") if "controls" in path.parts and path.is_file()}
    opened(out).save_pretrained(out)
    assert before
    assert before == {path: path.read_bytes() for path in before}
