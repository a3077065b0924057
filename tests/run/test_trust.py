"""Code that files name: run only where it is trusted."""

import json
import shutil

import pytest
import torch
import yaml

from ctrl_diffusion.prior.prior import Prior
from ctrl_diffusion.run.config import check_code

MINE = "def label(image):\n    open('ran', 'w').close()\n    return 1\n"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A module of somebody's beside which the command runs."""
    (tmp_path / "somebodys.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {"control": "light:somebodys:label"},
        {"control": "light", "column": "somebodys:label"},
        {"controls": [{"name": "light", "column": "somebodys:label", "data": "x"}]},
        {"control": "light", "condition": "c:somebodys:label"},
        {"control": "light", "classifier": {"factory": "somebodys:label"}},
    ],
)
def test_code_that_a_config_names_is_not_run_unless_it_is_trusted(code, ctrl_here, begun, settings):
    (code / "theirs.yaml").write_text(yaml.safe_dump({"prior": "digits", "data": str(begun / "data"), **settings}))
    asked = ["train", "--config", "theirs.yaml", "--out", "out"]
    done = ctrl_here(*asked)
    message = "ctrl: theirs.yaml runs code: somebodys:label. If you know it, pass --trust.\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert not (code / "ran").exists()
    if "classifier" not in settings and "condition" not in settings:
        assert "of ctrl" not in (done := ctrl_here(*asked, "--trust")).stderr
        assert "A control needs two classes" in done.stderr
        assert (code / "ran").exists()


def test_code_that_the_command_line_names_is_run(code, ctrl_here, begun):
    (code / "theirs.yaml").write_text(yaml.safe_dump({"prior": "digits", "data": str(begun / "data")}))
    named = ["--control", "light:somebodys:label", "--config", "theirs.yaml", "--out", "out"]
    assert "A control needs two classes" in ctrl_here("train", *named).stderr
    (code / "ran").unlink()
    assert "A control needs two classes" in ctrl_here("classifier", begun / "data", *named).stderr
    assert (code / "ran").exists()


def test_rules_of_ours_and_columns_need_no_trust(tmp_path):
    for column in ("ctrl_diffusion.data.rules:jpeg_size", "grey", "tags=hat"):
        check_code({"control": f"size:{column}", "data": "x"}, {}, False, tmp_path)
    for settings in ({"controls": [3]}, {"controls": {}}, {"classifier": 3}, [], {"control": None}):
        check_code(settings, {}, False, tmp_path)  # what is wrong with them is said elsewhere


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "add", "compare"])
def test_code_that_a_run_names_is_not_run_unless_it_is_trusted(code, ctrl_here, quick_run, command):
    theirs = shutil.copytree(quick_run, code / "theirs")
    about = theirs / "classifier" / "classifier.json"
    own = {"factory": "somebodys:label", "classes": 4, "input": [1, 8, 8], "balanced": False}
    about.write_text(json.dumps({**json.loads(about.read_text()), "kind": "Own", "shape": own}))
    asked = {"add": ["--data", "x", "--control", "y", "--out", "out"], "export": ["out"], "evaluate": []}
    asked = [command, theirs, *asked.get(command, ["--out", "out"])]
    done = ctrl_here(*asked)
    assert done.returncode == 2
    assert done.stderr.endswith("runs code: p̂ is made by somebodys:label. If you know it, pass --trust (trust=True).\n")
    assert not (code / "ran").exists()
    assert "somebodys:label" in ctrl_here(*asked, "--trust").stderr, "which makes no network"
    assert not (code / "out").exists()


def test_a_prior_that_is_a_pickle_is_not_loaded(tmp_path):
    from ctrl_diffusion.prior.source import DIGITS

    folder = shutil.copytree(DIGITS, tmp_path / "digits")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    torch.save({}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded: .*safetensors"):
        Prior.from_pretrained(folder)
