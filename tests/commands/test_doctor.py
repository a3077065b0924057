"""What a stranger may read of a machine: versions, what was recognised, and what goes wrong first."""

import getpass
import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from ctrl_diffusion.commands.jobs import doctor
from ctrl_diffusion.commands.jobs.doctor import doctor_job, without_folders
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder


@pytest.fixture
def photos(tmp_path):
    """Sixty grey images in a folder whose place is nobody's business, twenty of them dark."""
    dark = (torch.arange(60) % 3 == 0).long()
    x = 0.1 * torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5 - dark[:, None, None, None]
    folder = tmp_path / "My Secret" / "photos"
    write_imagefolder(folder, LabelledImages(x.clamp(-1, 1), {"dark": dark}, {"dark": ("no", "yes")}))
    return folder


def lines(text):
    """The lines by their names."""
    return {line[:12].strip(): line[13:] for line in text.splitlines()}


def test_without_prior_and_data_the_machine_is_described(ctrl_here):
    done = ctrl_here("doctor")
    said = lines(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"torch {version('torch')}, diffusers {version('diffusers')}" in said["packages"]
    assert {"ctrl", "device", "threads", "memory", "disk"} <= set(said)
    assert said["goes wrong"] == "nothing of these. To check a training name --prior, --data and --control"


def test_a_training_that_could_begin_is_recognised(ctrl_here, photos):
    done = ctrl_here("doctor", "--prior", "digits", "--data", photos, "--control", "dark")
    said = lines(done.stdout)
    assert done.returncode == 0, done.stderr
    assert said["prior"].startswith("digits: DiTPipeline, x 1 × 8 × 8, 10 classes, ")
    assert said["images"] == "60 of 1 × 8 × 8 for dark"
    assert said["dark"] == "2 classes: no × 40, yes × 20"
    assert said["goes wrong"] == "nothing that can be seen before p̂ is fitted"
    assert "My Secret" not in done.stdout


@pytest.mark.parametrize(
    ("options", "recognised", "problem"),
    [
        (["--prior", "digits", "--data", "{photos}", "--control", "size"], "prior", "has no column size; it has: "),
        (["--prior", "{photos}", "--data", "{photos}", "--control", "dark"], "dark", "is no pipeline folder"),
        (["--prior", "digits", "--data", "{tmp}/none", "--control", "dark"], "prior", "no folder or file none"),
        (["--data", "{photos}", "--control", "size"], "data", "photos/metadata.csv has no column size"),
        (["--data", "{photos}"], "data", "nothing of these"),
        (["--prior", "digits"], "prior", "nothing of these"),
        (["--config", "{tmp}/none.yaml"], "device", "No such file"),
        (["--prior", "digits", "--data", "{photos}", "--control", "dark", "-o", "gama=2"], "prior", "gama: Extra"),
    ],
)
def test_what_goes_wrong_first_is_said_beside_what_was_recognised(
    ctrl_here, photos, tmp_path, options, recognised, problem
):
    done = ctrl_here("doctor", *(option.format(photos=photos, tmp=tmp_path) for option in options))
    assert done.returncode == 0, done.stderr
    said = lines(done.stdout)
    assert recognised in said
    assert problem.replace("photos/", "") in said["goes wrong"]
    for private in ("My Secret", str(tmp_path.parent), str(Path.home()) + os.sep):
        assert private not in done.stdout


def test_bad_usage_is_an_error(ctrl_here):
    assert ctrl_here("doctor", "--nonsense").returncode == 2


def test_a_package_that_cannot_be_imported_is_what_goes_wrong():
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    found = doctor_job(broken)
    assert found.problem == "libcudart.so.13: cannot open shared object file"
    assert "packages" in found.facts


@pytest.mark.parametrize(
    ("needed", "problem"),
    [
        ("pytest>=99", "pytest is .*, and >=99 is needed"),
        ("no-such-package-here", "no-such-package-here is not installed"),
        ("pytest>=1", None),
        ("no-such-package-here; extra == 'play'", None),
    ],
)
def test_what_is_installed_is_held_against_what_is_needed(monkeypatch, needed, problem):
    monkeypatch.setattr(doctor, "requires", lambda name: [needed])
    if problem is None:
        doctor.check_installed()
    else:
        with pytest.raises(ValueError, match=problem):
            doctor.check_installed()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/ann/photos is damaged", "photos is damaged"),
        ("no file '/data/x y.png'", "no file 'x y.png'"),
        (r"C:\Users\ann\photos: row 3", "photos: row 3"),
        ("runs/of ann/secret/photos", "runs/of photos"),
        ("owner/name of the hub, 1/2 of it", "owner/name of the hub, 1/2 of it"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("{home}/a b/photos", "a b/photos"),
        ("a\nb", "a b"),
    ],
)
def test_paths_are_cut_to_their_last_part(text, left):
    assert without_folders(text.replace("{home}", str(Path.home()))) == left


def test_nothing_of_the_environment_is_said(ctrl_here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = ctrl_here("doctor").stdout
    assert "hf_secret" not in text
    assert getpass.getuser() not in text.split()
