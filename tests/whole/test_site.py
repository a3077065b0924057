"""The lessons name what there is, run as written, and the site is whole: strict, offline, fit for a phone."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from lessons import Lesson, cells_of, without_output
from markdown_it import MarkdownIt
from typer.main import get_command

import ctrl_diffusion
from ctrl_diffusion.commands.app import app
from ctrl_diffusion.run.config import Config, ControlSettings

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "docs" / "lessons").glob("*.py"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOW = "the site needs its builder and a browser: make .venv/docs and apt-get install chromium"
WIDTHS = {1280: 900, 390: 844}
ABORTED = "net::ERR_ABORTED"


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def cells(request):
    return cells_of(request.param.read_text(encoding="utf-8"))


def commands_of(cells):
    """The arguments of the commands of a lesson, without `ctrl`."""
    lines = [shlex.split(line) for cell in cells if not cell.is_text for line in cell.commands]
    return [words[1:] for words in lines if words[0] == "ctrl"]


def test_a_lesson_names_only_public_things(cells):
    for cell in cells:
        if not cell.is_text and not cell.commands:
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.ImportFrom) and node.module == "ctrl_diffusion":
                    assert {alias.name for alias in node.names} <= set(ctrl_diffusion.__all__)
                elif isinstance(node, ast.ImportFrom) and node.module.startswith("ctrl_diffusion."):
                    assert find_spec(node.module)
                assert not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr == "__file__"


def test_a_lessons_commands_have_these_options(cells):
    commands = get_command(app).commands
    for name, *words in commands_of(cells):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def exists(key):
    """Whether a config has a key such as adjoint.clip, or controls.0.classifier.updates."""
    model = Config
    for name in key.split("."):
        fields = {} if isinstance(model, tuple) else model.model_fields
        if model is Config:  # a single control is written without the list
            fields = {**ControlSettings.model_fields, **fields}
        if name not in fields and not name.isdigit():
            return False
        model = ControlSettings if name in ("controls", "0") else fields[name].annotation
    return True


@pytest.mark.parametrize("page", [*(ROOT / "docs").rglob("*.md"), *LESSONS], ids=lambda path: path.stem)
def test_settings_that_a_page_gives_exist(page):
    keys = re.findall(r"-o ([a-z_.0-9]+)=", page.read_text(encoding="utf-8"))
    assert [key for key in keys if not exists(key)] == []


def test_the_map_from_other_tools_names_settings_that_exist():
    text = (ROOT / "docs" / "why" / "from-elsewhere.md").read_text(encoding="utf-8")
    keys = re.findall(r"`((?:adjoint|backprop|ppo)\.[a-z_]+)`", text)
    assert len(keys) > 5
    assert [key for key in keys if not exists(key)] == []


def test_the_text_of_a_lesson_types_no_figure_by_hand(cells):
    """A figure with decimals in the text of a lesson comes from the run: it stands in braces."""
    for cell in cells:
        if cell.is_text:
            text = re.sub(r"```.*?```|`[^`]*`|\([^)]*\)", "", re.sub(r"{[^{}]*}", "", cell.text), flags=re.S)
            assert not re.findall(r"\d\.\d+|\d+ ?%", re.sub("(90|100) %", "", text)), cell.line


def test_a_lesson_becomes_a_page(tmp_path, monkeypatch):
    lesson = tmp_path / "1-toy.py"
    lesson.write_text(
        "# %% [markdown]\n# # Toy\n\n# %%\nn = 2\nprint('two')\nn + 1\n\n# %% A dot\nfrom matplotlib import pyplot\n\n"
        'pyplot.plot([0], [0])\nNone\n\n# %%\n# !ctrl --version\n\n# %% [markdown]\n# It is {n:.1f}, a `{"word"}`.\n',
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    page = Lesson(lesson, tmp_path).page()
    assert page.startswith("# Toy\n\n```python\nn = 2\nprint('two')\nn + 1\n```\n\n```text\ntwo\n3\n```\n")
    assert "![A dot](1-toy-1.png)" in page
    assert "It is 2.0, a `word`." in page
    assert "```console\n$ ctrl --version\n```\n\n```text\n" in page
    assert (tmp_path / "1-toy-1.png").read_bytes().startswith(b"\x89PNG")
    assert "It is …, a `…`." in without_output(lesson.read_text(encoding="utf-8"))


@pytest.mark.parametrize("cell", ["1 / 0", "# !ctrl train --prior nowhere --data here --control y --out run"])
def test_an_error_in_a_lesson_names_its_line(tmp_path, monkeypatch, cell):
    lesson = tmp_path / "1-toy.py"
    lesson.write_text(f"# %% [markdown]\n# # Toy\n\n# %%\n{cell}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"1-toy\.py, the cell at line 5: (division by zero|ctrl train .*exit code 2)"
    ):
        Lesson(lesson, tmp_path).page()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the site, its lessons as they ran before or without output; skip where its builder is not installed."""
    if not find_spec("mkdocs") or not find_spec("material"):
        pytest.skip(HOW)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", ROOT / "mkdocs.yml", "-d", folder]
    environment = {**os.environ, "CTRL_LESSONS": "cached", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(folder):
    return sorted(path for path in folder.rglob("*.html") if path.name != "404.html" and "-" not in path.stem[-3:])


def test_a_page_reads_alike_here_and_on_github(built):
    """Python-Markdown nests lists by four spaces, GitHub's by the marker: on one of them items would be lost."""
    markdown = MarkdownIt("commonmark").enable("table")
    for source in (ROOT / "docs").rglob("*.md"):
        if source.name == "api.md":  # made of docstrings
            continue
        page = (built / source.relative_to(ROOT / "docs")).with_suffix(".html").read_text(encoding="utf-8")
        article = page[page.index("<article") : page.index("</article")]
        there = markdown.render(source.read_text(encoding="utf-8"))
        for tag in ("li", "tr", "h2", "h3", "img"):
            counts = [len(re.findall(f"<{tag}[ >]", text)) for text in (there, article)]
            assert counts[0] == counts[1], f"{source.name}: {tag}"


def test_llms_txt_lists_every_page(built):
    text = (built / "llms.txt").read_text(encoding="utf-8")
    assert text.startswith("# CTRL\n\n> ")
    for page in built.rglob("*.html"):
        name = page.relative_to(built).as_posix()
        if (ROOT / "docs" / name).with_suffix(".md").is_file() and name != "index.html":
            assert re.search(rf"^- \[.+\]\({re.escape(name)}\): \S", text, re.M), name


@pytest.fixture(scope="module")
def browser(built):
    if not (CHROMIUM and find_spec("playwright")):
        pytest.skip(HOW)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def visit(browser, request):
    """A page of a browser's window, and what it complained of or asked other hosts for."""
    context = browser.new_context(viewport={"width": request.param, "height": WIDTHS[request.param]})
    page, faults = context.new_page(), []
    page.set_default_timeout(300_000)  # a busy machine is no fault of the page
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else faults.append(asked.url)
    )
    # what going on to the next page cut off is no fault
    page.on("requestfailed", lambda asked: None if asked.failure == ABORTED else faults.append(asked.url))
    yield page, faults
    context.close()


def test_every_page_is_offline_and_fits_the_window(visit, built):
    page, faults = visit
    for path in pages(built):
        page.goto(path.as_uri())
        page.wait_for_selector("article")
        assert not faults, f"{path.name}: {faults}"
        width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1], f"{path.name}: {width}"


def test_the_search_finds_a_word(visit, built):
    page, faults = visit
    page.goto((built / "index.html").as_uri())
    if page.viewport_size["width"] < 1000:
        page.click("label[for=__search].md-header__button")
    page.locator("input.md-search__input").press_sequentially("certificate")
    page.wait_for_selector(".md-search-result__item")
    assert "certificate" in page.inner_text(".md-search-result__list").lower()
    assert not faults
