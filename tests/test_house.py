"""Imports point one way, and the README's tree is the tree on disk."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "ctrl_diffusion"
ORDER = (
    "files folders progress schedule denoise ranks transition scale control rollout conditions images rules sources "
    "data reading classifier backbone support independence reward learn train sample guide certificate evaluate "
    "fidelity exact lattice testbed bias pretrained controlled assets demo config inspection judges run report export "
    "checkpoint tracking prepare course job estimate entrants compare cli"
).split()
# rooms that may know only these
NARROW = {
    "guide": set("conditions control denoise reward rollout sample schedule transition classifier".split()),
    "exact": {"schedule", "denoise"},
    "pretrained": {"schedule", "denoise"},
    "assets": set(),
}
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    package = path.relative_to(SOURCE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(*base, *name.split("."))[0] for name in names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.startswith("ctrl_diffusion") for name in names), f"{path}: import relatively"
    return found - {room(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    here = room(path)
    assert here in ORDER, f"{here} has no place in the house"
    for other in imported(path):
        assert ORDER.index(other) < ORDER.index(here), f"{here} must not import {other}"
        assert other in NARROW.get(here, {other}), f"{here} may know only {NARROW[here]}"


def test_learners_do_not_know_each_other():
    learners = {p.stem for p in (SOURCE / "learn").glob("*.py")} - {"__init__"}
    for name in learners:
        text = (SOURCE / "learn" / f"{name}.py").read_text()
        assert not re.search(rf"from \.({'|'.join(learners - {name})}) import", text)


def test_the_readme_shows_the_tree_on_disk():
    tree = re.search(r"```text\n(src/ctrl_diffusion/.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    named = set(re.findall(r"[\w/]+\.(?:py|html)\b", tree[1].split("\nexamples/")[0]))
    on_disk = {p.name for p in MODULES + list(SOURCE.rglob("*.html")) if p.name != "__init__.py"}
    assert {Path(name).name for name in named} == on_disk


def test_the_core_stays_small():
    """What the method needs once there are a prior and labelled tensors.

    Not the core are the borders to others' networks and to users' files, the baselines and their comparison, the races
    and what is known of them, pictures, commands and their jobs, what these say beforehand, what they keep on the way
    and how they are shared by processes.
    """
    borders = ("pretrained", "controlled", "export", "backbone", "images", "rules", "sources", "reading")
    races = ("guide", "fidelity", "entrants", "compare", "exact", "lattice", "testbed", "bias")
    jobs = ("folders", "inspection", "checkpoint", "ranks", "prepare", "course", "job", "cli", "estimate", "tracking")
    outside = (*borders, *races, *jobs, "assets", "demo", "report")
    core = [p for p in MODULES if room(p) not in outside]
    assert sum(len(p.read_text(encoding="utf-8").splitlines()) for p in core) < 5200
