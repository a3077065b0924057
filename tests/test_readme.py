"""The README's Python runs as it stands, in a folder where `make demo` has been."""

import re
from importlib import import_module
from pathlib import Path

import pytest

import ctrl_diffusion

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(quick_run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(quick_run)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "updates=850" in code
    names = {}
    exec(code.replace("updates=850", "updates=2"), names)
    assert names["sevens"].shape == (16, 1, 8, 8)
    assert (tmp_path / "my-control" / "control.safetensors").is_file()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).is_file(), link
    assert not re.findall(r"^[A-Z]{6,}$", text, re.M), "a placeholder"


@pytest.mark.parametrize("name", ctrl_diffusion.__all__)
def test_public_names_are_where_they_are_said_to_be(name):
    home = import_module(f"ctrl_diffusion.{ctrl_diffusion._HOME[name]}")
    assert getattr(ctrl_diffusion, name) is getattr(home, name)
