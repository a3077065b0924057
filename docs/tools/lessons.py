"""Run a lesson of docs/lessons/ and write its page: text, code, what the code printed and the pictures it drew.

python docs/tools/lessons.py docs/lessons/1-first-control.py OUT      (write OUT/page.md and its pictures)

A lesson is a Python file in cells, the percent format that Jupytext, VS Code and PyCharm read:

# %% [markdown]    text; {expression:format} is filled in from the variables of the lesson
# %% A title       code; the title describes its picture. A line `# !ctrl …` is a command, run in a shell of its own

Output is what was printed, the value of a cell's last line, the figures of matplotlib, and pictures and reports
(PIL images, paths to .html). A lesson runs in an empty folder; an error in it is an error of this program.
"""

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"^# %%(?P<text> \[markdown\])?(?P<title>.*)$", re.M)
COMMAND = "# !"
WIDTH = 100  # of what a command writes


@dataclass(frozen=True)
class Cell:
    """Hold one cell: its source, whether it is text, its title, and the line of the file it begins on."""

    source: str
    is_text: bool
    title: str
    line: int

    @property
    def text(self) -> str:
        """The Markdown of a text cell, without the comment signs."""
        return "\n".join(re.sub(r"^# ?", "", line) for line in self.source.splitlines())

    @property
    def commands(self) -> list[str]:
        """The commands of a code cell, a line each; a backslash at its end joins the next line to it."""
        lines = [line.removeprefix(COMMAND) for line in self.source.splitlines() if line.startswith(COMMAND)]
        return "\n".join(lines).replace("\\\n", " ").splitlines()


def cells_of(text: str) -> list[Cell]:
    """Split a lesson into its cells; what stands before the first marker is not part of the page."""
    markers = [*MARKER.finditer(text)]
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    return [
        Cell(
            text[marker.end() : end].strip("\n"), bool(marker["text"]), marker["title"].strip(),
            text.count("\n", 0, marker.end()) + 2,
        )
        for marker, end in zip(markers, ends, strict=True)
    ]  # fmt: skip


def without_output(text: str) -> str:
    """Return the page of a lesson that was not run, with … for every {expression}."""
    parts = [re.sub(r"{[^{}]+}", "…", cell.text) if cell.is_text else shown(cell) for cell in cells_of(text)]
    return "\n\n".join(parts) + "\n"


def shown(cell: Cell) -> str:
    """Return a code cell as Markdown: commands as a console, the rest as Python."""
    if cell.commands:
        lines = [line.removeprefix(COMMAND) for line in cell.source.splitlines()]
        prompts = ["$ ", *("  " if line.endswith("\\") else "$ " for line in lines[:-1])]
        return "```console\n" + "\n".join(map("".join, zip(prompts, lines, strict=True))) + "\n```"
    return f"```python\n{cell.source}\n```"


@dataclass
class Lesson:
    """Run the cells of a lesson in one namespace; put its pictures and files into `out`, named after the lesson."""

    path: Path
    out: Path
    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    files: int = 0

    def page(self) -> str:
        """Run every cell and return the page."""
        start, parts = time.monotonic(), []
        for cell in cells_of(self.path.read_text(encoding="utf-8")):
            try:
                parts += [self.filled_in(cell)] if cell.is_text else [shown(cell), *self.outputs(cell)]
            except Exception as error:
                raise RuntimeError(f"{self.path.name}, the cell at line {cell.line}: {error}") from error
        parts.append(f"*This page ran in {time.monotonic() - start:.0f} seconds when the site was built.*")
        return "\n\n".join(parts) + "\n"

    def filled_in(self, cell: Cell) -> str:
        """Return the text of a cell with the values of its {expressions}."""
        return eval('rf"""' + cell.text + ' """', self.namespace).rstrip()

    def outputs(self, cell: Cell) -> list[str]:
        """Run a code cell and return what it gave, as Markdown."""
        printed, value = io.StringIO(), None
        if cell.commands:
            printed.write("".join(map(output_of, cell.commands)))
        else:
            with contextlib.redirect_stdout(printed):
                value = self.run(cell)
        text = printed.getvalue().replace(f"{Path.cwd()}/", "").rstrip()
        pictures = [self.added(value, cell.title), *self.figures(cell.title)]
        if value is not None and not pictures[0]:
            text = f"{text}\n{value!r}".lstrip()
        return [f"```text\n{text}\n```"] * bool(text) + [picture for picture in pictures if picture]

    def run(self, cell: Cell) -> Any:
        """Execute a cell's Python and return the value of its last line, if that is an expression."""
        tree = ast.parse("\n" * (cell.line - 1) + cell.source, self.path.name)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, self.path.name, "exec"), self.namespace)
        if last is None:
            return None
        return eval(compile(ast.Expression(last.value), self.path.name, "eval"), self.namespace)

    def figures(self, title: str) -> list[str]:
        """Save and close the figures that matplotlib has open."""
        from matplotlib import pyplot

        saved = []
        for number in pyplot.get_fignums():
            pyplot.figure(number).savefig(self.file(".png"), dpi=150, bbox_inches="tight")
            saved.append(f"![{title}]({self.name('.png')})")
            self.files += 1
        pyplot.close("all")
        return saved

    def added(self, value: Any, title: str) -> str:
        """Save a PIL image, or copy an HTML file, and return the Markdown that shows it; nothing for other values."""
        from PIL import Image

        if isinstance(value, Image.Image):
            value.save(self.file(".png"))
            link = f"![{title}]({self.name('.png')})"
        elif isinstance(value, Path) and value.suffix == ".html":
            shutil.copy(value, self.file(".html"))
            link = f"[{title or value.name}]({self.name('.html')})"
        else:
            return ""
        self.files += 1
        return link

    def name(self, suffix: str) -> str:
        """Return the name of the lesson's next file."""
        return f"{self.path.stem}-{self.files + 1}{suffix}"

    def file(self, suffix: str) -> Path:
        """Return the path of the lesson's next file."""
        return self.out / self.name(suffix)


def output_of(command: str) -> str:
    """Run a command of `ctrl` or Python with this interpreter; return what it wrote, in lines of WIDTH letters.

    Progress bars are left out. An exit code other than 0 raises RuntimeError with the end of the output.
    """
    program, *arguments = shlex.split(command)
    module = {"ctrl": ["-m", "ctrl_diffusion"], "python": []}[program]
    arguments = [str(ROOT / argument) if argument.startswith("examples/") else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, *module, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8",
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{textwrap.indent(done.stdout[-2000:], '  ')}")
    lines = (line for line in done.stdout.splitlines() if "━" not in line)
    return "".join(
        textwrap.fill(line, WIDTH, subsequent_indent="  ", replace_whitespace=False) + "\n" for line in lines
    )


def main() -> None:
    """Run the lesson named on the command line, in an empty folder."""
    import matplotlib

    matplotlib.use("agg")
    path, out = (Path(argument).resolve() for argument in sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)  # for modules that a lesson writes
        page = Lesson(path, out).page()
        os.chdir(ROOT)
    (out / "page.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
