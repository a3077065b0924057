"""Whatever the code page of the output: the same exit code, no traceback, and nothing lost that it can show."""

import io
import os
import subprocess
import sys

import pytest

from ctrl_diffusion.commands.line.terminal import spelled
from tests.conftest import exit_code

PAGES = ["cp1251", "cp1252", "latin-1", "cp437", "cp932", "koi8-r", "ascii", "utf-8"]
COMMANDS = "demo classifier train add inspect sample evaluate compare export exact".split()


class Terminal:
    """Standard output and error of a code page, with Python's usual handling of errors."""

    def __init__(self, monkeypatch, page, errors="strict"):
        self.page, self.streams = page, {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
        for name, stream in self.streams.items():
            handling = errors if name == "stdout" else "backslashreplace"
            monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=page, errors=handling))

    def text(self, name):
        getattr(sys, name).flush()
        # of ASCII the command line's library thinks that nobody means it, and writes UTF-8
        return self.streams[name].getvalue().decode("utf-8" if self.page == "ascii" else self.page)


@pytest.mark.parametrize("page", PAGES)
def test_every_help_shows_under_every_code_page(monkeypatch, page):
    terminal = Terminal(monkeypatch, page)
    assert [exit_code(command, "--help") for command in COMMANDS] == [0] * len(COMMANDS)
    text = terminal.text("stdout")
    assert text.count("Usage: ") == len(COMMANDS)
    assert ("γ; 1 asks for" in text) or ("gamma; 1 asks for" in text)
    assert "\\u" not in text, "a word, no escape"


@pytest.mark.parametrize("page", PAGES)
def test_errors_and_tables_show_under_every_code_page(monkeypatch, page):
    terminal = Terminal(monkeypatch, page)
    assert exit_code("inspect", "digits") == 0
    shown = terminal.text("stdout")
    assert "1 × 8 × 8" in shown or "1 x 8 x 8" in shown
    assert exit_code("compare", "дым/\udcff", "--labels", "−5") == 2
    error = terminal.text("stderr")
    assert error.startswith("ctrl: --labels ")
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("page", PAGES)
def test_so_do_they_where_the_environment_names_it(page):
    """In a process of its own, whose streams Python itself has opened."""
    environment = {**os.environ, "PYTHONIOENCODING": page, "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "ctrl_diffusion", "train", "--help"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run([*command[:-1], "--time", "−1 γ"], capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"ctrl: ")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_progress_shows_under_every_code_page(monkeypatch, page):
    from ctrl_diffusion.commands.line.options import job_options
    from ctrl_diffusion.commands.line.terminal import spell_output

    terminal = Terminal(monkeypatch, page)
    spell_output()
    with job_options(quiet=False) as options:
        options.phase("p̂(γ) × дым …", 2)(2, "J = −1 ± 0.5")
    assert "2/2" in terminal.text("stderr")


def test_no_stream_is_no_error(monkeypatch):
    """As where a window has none, or the shell has closed one."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert exit_code("train", "--help") == 0


@pytest.mark.parametrize(
    ("text", "ascii"),
    [
        ("p̂(y | x) ∝ γ Σ", "p^(y | x) \\u221d gamma Sigma"),
        ("σ_off … 2×3 − 1 ± ½", "sigma_off ... 2x3 - 1 +- 1/2"),
        ("é ń Ẑ ŵ x₁ 10²", "e n Z^ w^ x1 102"),
        ("дым 日", "\\u0434\\u044b\\u043c \\u65e5"),
        ("plain | text", "plain | text"),
        ("ή", "eta"),
    ],
)
def test_what_a_page_lacks_is_spelled(text, ascii):
    assert spelled(text) == ascii


def test_bytes_of_a_name_that_are_no_text_stay(monkeypatch):
    terminal = Terminal(monkeypatch, "utf-8")
    assert exit_code("export", "runs/\udcff", "out") == 2
    sys.stderr.flush()
    assert b"there is no folder runs/\xff." in terminal.streams["stderr"].getvalue()
