"""The reference pages have an entry, with an anchor, for every public name, command, option, key and figure."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import typer
from tiny import TINY

import ctrl_diffusion
from ctrl_diffusion import train_job
from ctrl_diffusion.commands.app import app
from ctrl_diffusion.commands.jobs.compare import compare_job
from ctrl_diffusion.run.config import Config, ControlSettings
from ctrl_diffusion.system.files import write_text

DOCS = Path(__file__).parents[2] / "docs"
SOURCE = "\n".join(p.read_text(encoding="utf-8") for p in (DOCS.parent / "src").rglob("*.py"))


def anchors(page):
    """The anchors of a page, each of which stands there once."""
    (path,) = DOCS.rglob(page)
    found = re.findall(r'<a id="([^"]+)"></a>', path.read_text(encoding="utf-8"))
    assert len(found) == len(set(found))
    return set(found)


def test_every_public_name_has_an_entry():
    assert {name.removeprefix("ctrl_diffusion.") for name in anchors("api.md")} == set(ctrl_diffusion.__all__)


def test_every_command_and_option_has_an_entry():
    group = typer.main.get_command(app)
    (path,) = DOCS.rglob("commands.md")
    headings = set(re.findall(r"^## `(.*)`$", path.read_text(encoding="utf-8"), re.M))
    assert headings == {f"ctrl {name}" for name in group.commands}
    commands = {"ctrl": group, **{f"ctrl-{name}": command for name, command in group.commands.items()}}
    options = {
        f"{command}-{max(parameter.opts, key=len).lstrip('-')}"
        for command, about in commands.items()
        for parameter in about.params
    }
    assert anchors("commands.md") == options | {f"{command}-help" for command in commands}


def paths_of(values, prefix=""):
    """The dotted paths of nested values, groups and rows included; what is empty has no fields to show."""
    if isinstance(values, list):
        return set().union(*(paths_of(row, f"{prefix}[]") for row in values if isinstance(row, dict)))
    if not isinstance(values, dict):
        return set()
    paths = set()
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else key
        paths |= {path} | paths_of(value, path)
    return paths


def test_every_key_of_the_config_has_an_entry():
    config = Config(prior="digits", controls=[ControlSettings(name="ink", data="-")])
    keys = {re.sub(r"^controls\[\]", "controls.N", path) for path in paths_of(config.model_dump())}
    assert anchors("config.md") == keys


@pytest.fixture(scope="module")
def rich(quick_run, tmp_path_factory):
    """What a run with most of the optional groups wrote: two controls, one that does not see c, and so on."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(quick_run / "data", folder / "data")
    table = folder / "data" / "metadata.csv"
    names, *rows = table.read_text(encoding="utf-8").splitlines()
    column = names.split(",").index("ink")
    lines = [f"{row},{'yes' if int(row.split(',')[column]) > 2 else 'no'}" for row in rows]
    write_text(table, "\n".join([f"{names},dark", *lines]))
    control = {"data": str(folder / "data"), "condition": "digit", "classifier": TINY["classifier"]}
    settings = {name: value for name, value in TINY.items() if name != "classifier"} | {
        "prior": "digits", "gammas": [1, 2], "classes": [1, 3, 7], "hold_out": [7],
        "controls": [
            {"name": "ink", "ruler": "ink", "interval": [0.1, 0.9], "sees_condition": False, **control},
            {"name": "dark", **control},
        ],
        "evaluation": {**TINY["evaluation"], "prior_samples": 60},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_job(settings, folder / "run")
    return folder / "run"


# what depends on how a training goes, or on y on a scale
AT_TIMES = (
    "certificate.on_paths.", "verdict.climbing.", "training.stages[].rose", "training.stages[].decay_",
    "training.stages[].stopped", "training.stages[].slower", "training.stages[].skipped",
    "training.stages[].probe_outside", "scale.NAME",
)  # fmt: skip


def entry_of(path):
    """The entry of a field of metrics.json: names of controls are NAME, held-out figures those of the run."""
    path = re.sub(r"^held_out\.", "", path)
    path = re.sub(r"^(controls|intervals|labels|scale)\.(ink|dark)", r"\1.NAME", path)
    path = re.sub(r"^dependence\.ink and dark", "dependence.PAIR", path)
    path = re.sub(r"^classifier\.(ink|dark)\.", "classifier.", path)
    figures = {"accuracy", "accuracy_stderr", "judge_accuracy", "class_accuracy", "diversity", "outside_support"}
    group, _, figure = path.partition(".")
    return f"figures.{figure}" if group in ("prior", "target", "ctrl") and figure in figures else path


def check_entries(fields, entries, groups, at_times=()):
    """Groups may go without an entry of their own, where all that they hold has one."""
    assert fields - entries <= groups
    missing = {entry for entry in entries - fields if not entry.startswith(at_times or "\0")}
    assert not missing, "no run has these"
    for entry in entries - fields - missing:
        assert re.search(rf"\b{re.split(r'[.]', entry)[-1].removeprefix('NAME') or 'scale'}\b", SOURCE), entry


def test_every_figure_of_a_run_has_an_entry(quick_run, rich):
    fields = set()
    for folder in (quick_run, rich):
        fields |= set(map(entry_of, paths_of(json.loads((folder / "metrics.json").read_text()))))
    entries = {name for name in anchors("metrics.md") if not name.startswith(("compare.", "control."))}
    groups = set("prior target ctrl certificate verdict training classifier classifier.ink classifier.dark controls "
                 "controls.NAME controls.NAME.nulled controls.NAME.nulled.stderr intervals dependence labels sweep "
                 "training.stages".split())  # fmt: skip
    check_entries(fields, entries, groups, AT_TIMES)


def test_every_figure_of_a_comparison_has_an_entry(quick_run, tmp_path):
    shutil.copytree(quick_run, tmp_path / "run")
    config = Config.read(tmp_path / "run" / "config.yaml")
    config.with_(classes=[3, 8], steps=4, evaluation={"prior_samples": 40}).write(tmp_path / "run" / "config.yaml")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare_job(tmp_path / "run", tmp_path / "out", ["ctrl", "rejection"], strengths=(1.0, 2.0), n=16)
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    for method, values in list(compared["chosen"].items()):
        compared["chosen"] |= {"METHOD": {**values, **compared["chosen"].get("METHOD", {})}}
        del compared["chosen"][method]
    fields = {re.sub(r"\.ink$", ".NAME", f"compare.{path}") for path in paths_of(compared)}
    fields = {path for path in fields if not re.search(r"\.settings\.", path)}
    entries = {name for name in anchors("metrics.md") if name.startswith("compare.")}
    groups = {f"compare.{name}" for name in ("chosen", "cells", "left_out", "rows")}
    groups |= {f"compare.cells[].classifier_{name}" for name in ("accuracy", "nll")}
    check_entries(fields, entries, groups, ("compare.left_out[].", "compare.cells[].seconds."))


def test_every_field_of_a_control_has_an_entry(rich):
    about = json.loads((rich / "control" / "ink" / "control.json").read_text())
    assert {name.removeprefix("control.") for name in anchors("metrics.md") if name.startswith("control.")} == set(
        about
    )
