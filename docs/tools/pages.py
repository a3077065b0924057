"""Write config.md and api.md of docs/reference, and give every option in commands.md an anchor: `make docs` calls this.

The page of keys is made of the settings' types, defaults and bounds, and of the `Args:` of their docstrings; a sentence
there that begins with "Cost:" says what a key costs.
"""

import inspect
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

import ctrl_diffusion
from ctrl_diffusion.commands.app import app
from ctrl_diffusion.evaluate.rulers.table import RULERS
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.defaults import suggested

DOCS = Path(__file__).parents[1]
REFERENCE = DOCS / "reference"
INTRODUCTION = """# Settings

Every key of `config.yaml`, of `ctrl train --config FILE` and of `-o KEY=VALUE`, such as `-o adjoint.clip=5`. An unknown
key is an error, which names the nearest key there is. A single control may be written without the list: `control: NAME`
and its other keys beside it.

A key without a line on its cost changes neither time nor memory. *Chosen by `ctrl train`* marks keys whose default
there depends on prior and data: the run's own `config.yaml` shows the value, and a value of yours wins. This page is
made of the code by `make docs`.
"""
# the first key of each part of the page
PARTS = {
    "prior": "The prior",
    "controls": "The controls",
    "seed": "The target",
    "steps": "The chain",
    "device": "The machine",
    "rank": "The adapter",
    "learners": "The training",
    "contrast": "The learners",
    "evaluation": "The evaluation",
}
# options that `--help` leaves out to stay a screen
HIDDEN = {
    "hold_out": "Of the prior's classes or prompts, so many are kept out of training and certified apart.",
    "image": "The column of the images.",
    "missing": "bad or keep: whether a label such as NaN or ? makes a row bad, or is a class.",
    "overwrite": "Replace what ctrl wrote there before.",
    "prompts": "The conditions c of a prior that is given text: a file, one a line.",
    "quick": "A smoke test.",
    "skip_bad": "Leave out rows that cannot be used, and count them.",
    "steps": "Steps of the chain that is trained and certified.",
    "track": "Trackers, such as tensorboard or wandb.",
    "trust": "Run code that a config.yaml or a run names.",
    "updates": "Of all learners together.",
}
NAMES = """# Python names

What `from ctrl_diffusion import …` takes, by the package that it comes from, in the order in which packages build on
each other. Shapes stand in brackets: B samples, \\* the shape of one x, G conditions c, K labels y. Wrong arguments
raise `ValueError`, in one line that says what was got and what to do. This page is made of the code by `make docs`.
"""
WINGS = ("chain", "data", "prior", "control", "reward", "learn", "guide", "evaluate", "run", "commands")
ROWS = {"controls": "controls.N."}  # groups of which a list has several
TABLES = {"controls.N.ruler": {name: ruler.measures for name, ruler in RULERS.items()}}  # what a key's values mean


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Read what the `Args:` of a model's docstring, and of those it derives from, say of each key."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        _, _, block = (base.__dict__.get("__doc__") or "").partition("Args:\n")
        for entry in re.split(r"\n(?=\S)", inspect.cleandoc("\n" + block)):
            names, _, text = entry.partition(": ")
            found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


def group_of(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a key that has keys of its own, or is a list of such; None for any other."""
    kinds = (annotation, *get_args(annotation))
    classes = (kind for kind in kinds if isinstance(kind, type) and not get_args(kind))  # list[str] is a type on 3.10
    return next((kind for kind in classes if issubclass(kind, BaseModel)), None)


def type_of(annotation: Any) -> str:
    """Describe a type in words."""
    words = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}
    if annotation in words:
        return words[annotation]
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind in (Union, types.UnionType):
        return " or ".join(type_of(argument) for argument in arguments)
    if kind is Literal:
        return " or ".join(json.dumps(argument) for argument in arguments)
    if kind is tuple:
        return f"[{', '.join(map(type_of, arguments))}]"
    if kind is list:
        return f"list of {type_of(arguments[0])}"
    return type_of(arguments[0])  # Annotated


def bounds_of(field: FieldInfo) -> str:
    """Describe the bounds of a number."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = [
        f"{sign} {getattr(bound, name):,}"
        for bound in field.metadata
        for name, sign in signs.items()
        if getattr(bound, name, None) is not None
    ]
    return "".join(f", {bound}" for bound in bounds)


def default_of(field: FieldInfo) -> str:
    """Describe a default as YAML would have it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"default `{json.dumps(value, ensure_ascii=False)}`"


def entries(model: type[BaseModel], prefix: str, chosen: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key with its entry; `chosen` are the keys whose defaults `ctrl train` derives from prior and data."""
    said = descriptions(model)
    for key, field in model.model_fields.items():
        name, group = prefix + key, group_of(field.annotation)
        text, _, cost = said[key].partition("Cost: ")
        text = text.strip()
        if not group:
            kind = f"{type_of(field.annotation)}{bounds_of(field)} · {default_of(field)}"
            kind += " · *chosen by `ctrl train`*" if key in chosen else ""
            lines = [f'<a id="{name}"></a>**`{name}`** · {kind}', f"{text[0].upper()}{text[1:]}"]
            values = "\n".join(f"- `{value}`: {meaning}." for value, meaning in TABLES.get(name, {}).items())
            yield name, "\n\n".join(filter(None, [*lines, values, cost and f"*Cost:* {cost}"]))
        else:
            yield name, f'<a id="{name}"></a>**`{name}`** · keys of its own\n\n{text[0].upper()}{text[1:]}'
            yield from entries(group, ROWS.get(name, f"{name}."), chosen.get(key, {}))


def config_page() -> str:
    """Return the page of every key of the config."""
    parts = [INTRODUCTION]
    for name, entry in entries(Config, "", suggested((1, 8, 8), 1, 1, 1, 2)):
        parts += [f"## {PARTS[name]}\n"] if name in PARTS else []
        parts.append(entry + "\n")
    return "\n".join(parts)


def api_page() -> str:
    """Return the page of every public name, with a block for mkdocstrings each."""
    places: dict[str, dict[str, list[str]]] = {wing: {} for wing in WINGS}
    for name in ctrl_diffusion.__all__:
        value = getattr(ctrl_diffusion, name)
        path = f"{value.__module__}.{value.__qualname__}"
        places[path.split(".")[1]].setdefault(path, []).append(name)
    parts = [NAMES]
    for wing, values in places.items():
        parts.append(f"## {wing}\n")
        for path, names in values.items():
            anchors = "".join(f'<a id="ctrl_diffusion.{name}"></a>' for name in names)
            own = path.rpartition(".")[2]
            also = "".join(f"Also found as `{name}`, its name in 0.1." for name in names if name != own)
            parts.append(f"{anchors}{also}\n\n::: {path}\n")
    return "\n".join(parts)


def anchored(commands: str) -> str:
    """Return the page of commands with hidden options, and an anchor before each, such as `ctrl-train-out`."""
    group = get_command(app)
    contexts = {"ctrl": group} | {f"ctrl-{name}": command for name, command in group.commands.items()}
    lines, context = [], ""
    for line in commands.splitlines():
        if heading := re.match(r"#+ `(.*)`", line):
            context = heading[1].replace(" ", "-")
        option = re.match(r"\* `(?:-\w, )?([\w-]+)(?=[. `]).*`: ", line)
        if option and not (context == "ctrl" and option[1] in group.commands):  # which are listed like options
            line = f'* <a id="{context}-{option[1].lstrip("-")}"></a>{line[2:]}'
        lines.append(line)
        if option and option[1] == "--help":
            hidden = [each for each in contexts[context].params if getattr(each, "hidden", False)]
            lines += ["", "Beyond `--help`:", ""] if hidden else []
            lines += [
                f'* <a id="{context}-{each.opts[-1][2:]}"></a>`{each.opts[-1]}`: {HIDDEN[each.name]}' for each in hidden
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the pages."""
    (REFERENCE / "config.md").write_text(config_page(), encoding="utf-8")
    (REFERENCE / "api.md").write_text(api_page(), encoding="utf-8")
    (page,) = DOCS.rglob("commands.md")
    page.write_text(anchored(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
