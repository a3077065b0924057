"""The README's Python runs as it stands, in a folder where `make demo` has been."""

import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import ctrl_diffusion
from ctrl_diffusion.reward.classifiers import ClassifierSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:log Z")
def test_the_example_runs(quick_run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(quick_run)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    for long, short in (
        ("updates=800", "updates=2"),
        ("1000", "20"),
        ("10_000", "200"),
        ("50", "2"),
        ("2000", "80"),
        ('(data, "ink")', '(data, "ink", settings=FAST)'),
    ):
        assert long in code
        code = code.replace(long, short)
    names = {"FAST": ClassifierSettings(updates=200)}
    exec(code, names)
    assert names["sevens"].shape == (16, 1, 8, 8)
    assert names["found"].gap > 0
    assert (tmp_path / "my-control" / "control.safetensors").is_file()


def test_the_command_reference_is_the_codes_own(tmp_path):
    """`make docs` writes it; another version of typer may lay it out differently."""
    pinned = re.search(r"^typer==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    if version("typer") != pinned:
        pytest.skip(f"written with typer {pinned}")
    command = [sys.executable, "-m", "typer", "ctrl_diffusion.commands.app", "utils", "docs", "--name", "ctrl"]
    subprocess.run([*command, "--output", str(tmp_path / "commands.md")], check=True, capture_output=True)
    assert (tmp_path / "commands.md").read_text() == (ROOT / "docs" / "commands.md").read_text()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).is_file(), link
    assert not re.findall(r"^[A-Z]{4,}$", text, re.M), "a placeholder"


@pytest.mark.parametrize("name", ctrl_diffusion.__all__)
def test_public_names_are_where_they_are_said_to_be(name):
    home, _, attribute = ctrl_diffusion._HOME[name].partition(":")
    assert getattr(ctrl_diffusion, name) is getattr(import_module(f"ctrl_diffusion.{home}"), attribute or name)
