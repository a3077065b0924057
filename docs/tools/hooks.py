"""Extend MkDocs by what this site needs: lessons that run, anchors as GitHub writes them, llms.txt.

CTRL_LESSONS=cached in the environment takes the lessons that ran before and shows the others without their output.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

from lessons import without_output
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "lessons"
log = get_plugin_logger("lessons")


class LessonFile(File):
    """Be a Python file that is a page."""

    def is_documentation_page(self) -> bool:
        """Say that it is a page, which MkDocs asks of every file."""
        return True


def github_slug(text: str, separator: str) -> str:
    """Return the anchor that GitHub gives a heading: letters, marks, digits and _ in lower case, spaces as hyphens."""
    kept = (letter for letter in text.strip().lower() if unicodedata.category(letter)[0] in "LMN" or letter in "-_ ")
    return "".join(kept).replace(" ", separator)


def source_hash() -> str:
    """Return a hash of all code that a lesson's output may depend on, but for the lesson."""
    sources = [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*.py"), Path(__file__).with_name("lessons.py")]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def output_of(lesson: Path, code: str) -> Path | None:
    """Return the folder with a lesson's page and files, after running it if its output is not there."""
    key = hashlib.sha256(code.encode() + lesson.read_bytes()).hexdigest()[:16]
    folder = CACHE / f"{lesson.stem}-{key}"
    if (folder / "page.md").is_file():
        return folder
    if os.environ.get("CTRL_LESSONS") == "cached":
        return None
    log.info(f"running {lesson.name}")
    start, command = time.monotonic(), [sys.executable, Path(__file__).with_name("lessons.py"), lesson, folder]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise PluginError(f"{lesson.name} failed.\n{done.stderr[-4000:]}")
    log.info(f"{lesson.name} ran in {time.monotonic() - start:.0f} s")
    for older in CACHE.glob(f"{lesson.stem}-*"):
        if older != folder:
            shutil.rmtree(older)
    return folder


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write anchors as GitHub does, so that a link works there and here."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Run the lessons, and turn each into a page with its pictures beside it."""
    code = source_hash()
    for file in [file for file in files if re.fullmatch(r"lessons/[^/]+\.py", file.src_uri)]:
        files.remove(file)
        page = LessonFile(file.src_uri, file.src_dir, config.site_dir, config.use_directory_urls)
        files.append(page)
        folder = output_of(Path(file.src_dir, file.src_uri), code)
        if folder is None:
            page.content_string = without_output(page.content_string)
            continue
        page.content_string = (folder / "page.md").read_text(encoding="utf-8")
        for extra in sorted(folder.iterdir()):
            if extra.name != "page.md":
                files.append(File.generated(config, f"lessons/{extra.name}", abs_src_path=str(extra)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files outside docs/ into their names, since only the repository has them."""
    config.extra.setdefault("sentences", {})[page.file.src_uri] = first_sentence(markdown)

    def named(link: re.Match[str]) -> str:
        target = Path(config.docs_dir, page.file.src_uri).parent / link["path"]
        if link["path"].startswith("http") or target.resolve().is_relative_to(config.docs_dir):
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: no file {link['path']}")
        name = target.resolve().relative_to(ROOT).as_posix()
        return link["text"] if link["text"].strip("`") in name else f"{link['text']} (`{name}`)"

    return re.sub(r"(?<!!)\[(?P<text>[^\]\n]+(?:\n[^\]\n]+)?)\]\((?P<path>[^)#\s]+)(?:#[^)]*)?\)", named, markdown)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Keep the navigation for llms.txt."""
    config.extra["pages"] = nav.pages
    return nav


def first_sentence(markdown: str) -> str:
    """Return the first sentence of a page's first paragraph, as plain text on one line."""
    text = re.sub(r"^```.*?^```$", "", markdown, flags=re.M | re.S)
    blocks = (block.strip() for block in re.split(r"\n\s*\n", text))
    paragraph = next((block for block in blocks if block and block[0] not in "#!<|:-"), "")
    plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", " ".join(paragraph.split()))
    return re.split(r"(?<=[.?!])\s", plain)[0]


def on_post_build(config: MkDocsConfig) -> None:
    """Write llms.txt: what the project is, and a line for each page."""
    lines, section = [f"# {config.site_name}", "", f"> {config.site_description}"], ""
    for page in config.extra["pages"]:
        title = page.ancestors[-1].title if page.ancestors else "Home"
        if title != section:
            section = title
            lines += ["", f"## {section}", ""]
        lines.append(f"- [{page.title}]({page.url}): {config.extra['sentences'][page.file.src_uri]}")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
