"""Imports point one way, wings stay small, and the README's tree is the tree on disk."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ctrl_diffusion"
# what each wing may import of the others; a wing.room where it may know that room alone
BELOW_LEARN = {"reward", "control", "chain", "data", "system"}
BELOW_RUN = {"learn", "evaluate", "prior", *BELOW_LEARN}
LAW = {
    "system": set(),
    "chain": {"system.ranks"},
    "data": {"system"},
    "prior": {"chain", "system.ranks"},
    "control": {"chain", "data.labels", "prior.network", "system.files"},
    "reward": BELOW_LEARN - {"reward"},
    "learn": BELOW_LEARN,
    "guide": BELOW_LEARN,
    "evaluate": BELOW_LEARN,
    "exact": {"learn", "guide", "evaluate", *BELOW_LEARN},
    "run": BELOW_RUN,
    "report": {"run", "exact", "guide", *BELOW_RUN},
    "commands": {"report", "run", "exact", "guide", *BELOW_RUN},
}
# lines of each wing: what it has now and a little
LINES = {
    "system": 990, "chain": 740, "data": 1690, "prior": 2195, "control": 985, "reward": 1700, "learn": 1390,
    "guide": 750, "evaluate": 1910, "exact": 1370, "run": 4315, "report": 2620, "commands": 3605,
}  # fmt: skip
FILES, COMMANDS = 10, 14
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE)


def wing(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0]


def imported(path: Path) -> set[str]:
    """The modules a file imports of the package, dotted, as wing.room."""
    package = path.relative_to(SOURCE).parts[:-1]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            if node.module and (SOURCE.joinpath(*base, *node.module.split(".")) / "__init__.py").is_file():
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            # the version belongs to the package, not to a wing
            modules |= {".".join((*base, name)) for name in names if name != "__version__"}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.startswith("ctrl_diffusion") for name in names), f"{path}: import relatively"
    return modules


def test_the_law_names_every_wing_and_has_no_circle():
    assert set(LAW) == {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    below: set[str] = set()
    for name, allowed in LAW.items():
        assert {other.split(".")[0] for other in allowed} <= below, f"{name} imports up"
        below.add(name)


def test_no_file_imports_itself_by_way_of_others():
    def file_of(module: str) -> Path:
        path = SOURCE.joinpath(*module.split("."))
        files = path.with_suffix(".py"), path / "__init__.py", path.parent / "__init__.py"
        return next(file for file in files if file.is_file())

    graph = {path: {file_of(module) for module in imported(path)} for path in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)  # raises CycleError


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_obey_the_law(path):
    here = wing(path)
    for module in imported(path):
        other = module.split(".")[0]
        allowed = {other, ".".join(module.split(".")[:2])} & LAW[here]
        assert other == here or allowed, f"{here} must not import {module}"


@pytest.mark.parametrize("name", ["learn", "guide"])
def test_learners_and_baselines_do_not_know_each_other(name):
    shared = {"learn": {"step", "on_policy"}, "guide": {"method", "steered", "selection", "reconstruction"}}[name]
    for path in (SOURCE / name).glob("*.py"):
        if path.name not in ("__init__.py", "table.py"):
            rooms = {module.split(".")[1] for module in imported(path) if module.startswith(name)}
            assert rooms <= shared, f"{path.name} must not import {rooms - shared}"


def test_wings_are_small():
    for name, most in LINES.items():
        rooms = [p for p in MODULES if wing(p) == name]
        lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in rooms)
        assert lines <= most, f"{name} has {lines} lines, {most} at most"
    for folder in {p.parent for p in MODULES}:
        files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= (COMMANDS if folder.name == "commands" else FILES), f"{folder.name} has {len(files)} files"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines of code"
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            free = path.parent.name == "commands" or path == SOURCE / "run" / "pipeline.py"  # options; diffusers' parts
            assert free or count <= 12, f"{node.name} has {count} parameters"


def test_every_wing_says_in_one_sentence_what_it_is():
    for name in LAW:
        tree = ast.parse((SOURCE / name / "__init__.py").read_text(encoding="utf-8"))
        sentence = ast.get_docstring(tree)
        assert sentence, name
        assert re.fullmatch(r"[^.\n]+\.", sentence), f"{name}: {sentence!r}"


def test_the_readme_shows_the_tree_on_disk():
    tree = re.search(r"```text\n(src/ctrl_diffusion/.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    for name in LAW:
        line = re.search(rf"^  {name}/ +(.*)$", tree, re.M)
        assert line, f"the README's tree lacks {name}/"
        shown = set(re.split(r"  +", line[1])[0].replace("/", "").split())
        files = {p.stem for p in (SOURCE / name).glob("*.py")} - {"__init__"}
        folders = {p.name for p in (SOURCE / name).iterdir() if p.is_dir() and p.name != "__pycache__"}
        assert shown == files | folders, f"{name}/: README and disk differ by {shown ^ (files | folders)}"
