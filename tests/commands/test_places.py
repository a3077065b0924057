"""What is answered without torch: help, the version, and paths that lead nowhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("more", [{}, {"others": True}, {"out": "here"}, {"track": ["tensorboard"]}, {"size": "2"}])
def test_what_the_job_looks_at_before_is_left_to_it(tmp_path, monkeypatch, more):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"prior": "owner/name", "controls": [{"data": "here"}, {"data": "missing"}], "track": more.get("track")}
    if "size" in more:
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, "0")
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, more["size"])
    asked = options, Path(more.get("out", "out")), "others" in more
    if more:
        check_places(*asked)
    else:
        with pytest.raises(ValueError, match="no folder or file missing,"):
            check_places(*asked)
