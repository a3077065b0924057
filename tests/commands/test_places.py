"""What is answered without torch: help, the version, and paths that lead nowhere."""

import json
import subprocess
import sys

import pytest
import yaml

from ctrl_diffusion.commands.line.places import check_places

HEAVY = {
    "accelerate", "datasets", "diffusers", "gradio", "matplotlib", "numpy", "pandas", "peft", "pyarrow",
    "scipy", "sklearn", "torch", "torchmetrics", "transformers",
}  # fmt: skip
IMPORTED = """
import json, sys
try:
    {code}
finally:
    print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
MAIN = "sys.argv = ['ctrl', *{arguments!r}]; from ctrl_diffusion.commands.app import main; main()"
TRAIN = "train --control y --out o"


def imports_of(code, folder):
    """The top-level modules that code has imported when it ends, and what it wrote to standard error."""
    command = [sys.executable, "-c", IMPORTED.format(code=code)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return set(json.loads(done.stdout.splitlines()[-1])), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--help", ""),
        ("--version", ""),
        ("train --help", ""),
        (f"{TRAIN} --prior missing --data .", "ctrl: missing is no pipeline folder of diffusers"),
        (f"{TRAIN} --prior digits --data missing", "ctrl: there is no folder or file missing"),
        (f"{TRAIN} --dry-run --prior digits --data missing", "ctrl: there is no folder or file missing"),
        ("train --resume missing", "ctrl: missing has no run to go on with"),
        ("add ink --control y --out o --data missing", "ctrl: there is no folder or file missing"),
        ("classifier missing --control y --out o", "ctrl: there is no folder or file missing"),
    ],
)
def test_what_needs_no_model_does_not_wait_for_one(tmp_path, arguments, said):
    imported, errors = imports_of(MAIN.format(arguments=arguments.split()), tmp_path)
    assert "typer" in imported, "the command line ran"
    assert errors.startswith(said)
    assert not imported & HEAVY
    assert not list(tmp_path.iterdir())


def test_the_package_is_imported_without_torch_and_a_public_name_brings_it(tmp_path):
    assert not imports_of("import ctrl_diffusion", tmp_path)[0] & HEAVY
    assert "torch" in imports_of("from ctrl_diffusion import Prior", tmp_path)[0]


SETTLED = {"name": "old", "data": "missing", "settled_from": "run"}


@pytest.mark.parametrize(
    ("settings", "options", "overrides", "refused"),
    [
        ({"prior": "missing"}, {}, [], "/missing is no pipeline"),
        ({"prior": "digits", "data": "missing"}, {}, [], "no folder or file .*/missing,"),
        ({"controls": [{"name": "y", "data": "missing"}]}, {}, [], "no folder or file .*/missing,"),
        ({"controls": [SETTLED]}, {}, [], None),
        ({"prior": "owner/name", "data": "owner/name"}, {}, [], None),
        ({"prior": "missing", "data": "missing"}, {"prior": "digits", "data": "here"}, [], None),
        ({"prior": "missing"}, {}, ["prior=digits"], None),
        ({"prior": 3, "controls": "none"}, {}, [], None),
        ("no settings", {}, [], None),
        ({}, {"controls": [{"data": "here"}, {"data": "missing"}]}, [], "no folder or file missing,"),
    ],
)
def test_places_that_a_file_names_are_checked_where_they_would_be_read(
    tmp_path, monkeypatch, settings, options, overrides, refused
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    (folder := tmp_path / "elsewhere").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if refused is None:
        check_places(options, folder / "config.yaml", overrides)
    else:
        with pytest.raises(ValueError, match=refused):
            check_places(options, folder / "config.yaml", overrides)
