"""What README and docs say holds: examples run, links lead somewhere, names are where they are said to be."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from pages import anchored, api_page, config_page

import ctrl_diffusion
from ctrl_diffusion.reward.classifiers import ClassifierSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(quick_run, tmp_path, monkeypatch):
    """A folder where `make demo` has been."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(quick_run)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(page, shorter):
    """The only block of Python on a page, with less to compute."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    for long, short in shorter:
        assert long in code
        code = code.replace(long, short)
    return code


@pytest.mark.filterwarnings("ignore:log Z")
def test_the_readmes_example_runs(demo):
    tiny = {
        "classifier": {"updates": 200}, "learners": ["weighted"], "steps": 2, "rank": 2,
        "weighted": {"updates": 2, "batch": 16, "cache": 8, "renoising": 0},
        "evaluation": {"prior_samples": 8, "paths": 40, "probes": 1, "sweep_paths": 40},
    }  # fmt: skip
    names = {"TINY": tiny}
    exec(code_of("README.md", [("train_job(settings,", "train_job(settings | TINY,")]), names)
    assert names["images"].shape == (16, 1, 8, 8)
    assert (demo / "runs" / "ink" / "report.html").is_file()


@pytest.mark.filterwarnings("ignore:log Z")
def test_the_example_of_all_parts_runs(demo):
    shorter = {
        "updates=800": "updates=2", "1000": "300", "10_000": "3000", "50": "2", "2000": "80",
        '(data, "ink")': '(data, "ink", settings=FAST)',
    }  # fmt: skip
    names = {"FAST": ClassifierSettings(updates=200)}
    exec(code_of("docs/how-to/python.md", shorter.items()), names)
    assert names["sevens"].shape == (16, 1, 8, 8)
    assert names["certificate"].gap > 0
    assert (demo / "my-control" / "control.safetensors").is_file()


@pytest.mark.parametrize("name", ["assets:DIGITS", "denoise:as_denoiser", "rules:jpeg_size", "schedule:RectifiedFlow"])
def test_modules_that_documents_of_0_1_name_are_still_found(name):
    module, _, attribute = name.partition(":")
    assert getattr(import_module(f"ctrl_diffusion.{module}"), attribute)


@pytest.mark.parametrize("module", ["ctrl_diffusion", "ctrl_diffusion.cli"])
def test_the_command_line_starts_as_a_module(module):
    command = [sys.executable, "-m", module, "--version"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.strip() == version("ctrl-diffusion")


def test_the_command_reference_is_the_codes_own(tmp_path):
    """`make docs` writes it; another version of typer may lay it out differently."""
    pinned = re.search(r"^typer==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    if version("typer") != pinned:
        pytest.skip(f"written with typer {pinned}")
    command = [sys.executable, "-m", "typer", "ctrl_diffusion.commands.app", "utils", "docs", "--name", "ctrl"]
    subprocess.run([*command, "--output", str(tmp_path / "commands.md")], check=True, capture_output=True)
    (page,) = (ROOT / "docs").rglob("commands.md")
    assert anchored((tmp_path / "commands.md").read_text(encoding="utf-8")) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "write"), [("config", config_page), ("api", api_page)])
def test_reference_pages_are_the_codes_own(name, write):
    """`make docs` writes them."""
    assert write() == (ROOT / "docs" / "reference" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))])
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).is_file(), link
    assert not re.findall(r"^[A-Z]{4,}$", text, re.M), "a placeholder"


@pytest.mark.parametrize("name", ctrl_diffusion.__all__)
def test_public_names_are_where_they_are_said_to_be(name):
    module, _, attribute = ctrl_diffusion._MODULES[name].partition(":")
    assert getattr(ctrl_diffusion, name) is getattr(import_module(f"ctrl_diffusion.{module}"), attribute or name)


def test_type_checkers_see_the_public_names():
    """The imports under TYPE_CHECKING, the table of lazy ones and `__all__` say the same."""
    tree = ast.parse(Path(ctrl_diffusion.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    table = {name: place.partition(":") for name, place in ctrl_diffusion._MODULES.items()}
    assert seen == {name: (module, attribute or name) for name, (module, _, attribute) in table.items()}
    assert set(seen) == set(ctrl_diffusion.__all__) <= set(dir(ctrl_diffusion))
    assert ctrl_diffusion.__version__ == version("ctrl-diffusion")
