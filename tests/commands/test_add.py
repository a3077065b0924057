"""A control added to a run."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from tiny import TINY

from ctrl_diffusion.commands.jobs import train
from ctrl_diffusion.run.run import INK


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_control_added_later_leaves_the_run_as_it_was(ctrl_here, both, quick_run, tmp_path):
    """The model of one control before and after a second came: with that null, the same pictures to the byte."""
    settings = tmp_path / "tiny.yaml"
    settings.write_text(yaml.safe_dump(TINY | {"ruler": "slant", "learners": ["weighted", "adjoint"]}))
    before = {path: path.read_bytes() for path in quick_run.rglob("*") if path.is_file()}
    add = ["add", quick_run, "--data", both / "data" / "slant", "--control", "slant", "--config", settings]
    done = ctrl_here(*add, "--out", tmp_path / "more", "--quiet")
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in quick_run.rglob("*") if path.is_file()} == before
    weights = "control.safetensors"
    assert (tmp_path / "more" / "control" / "ink" / weights).read_bytes() == before[quick_run / "control" / weights]
    pictures = {}
    for name, run, asked in (
        ("old", quick_run, ["--set", "ink=1"]),
        ("nulled", tmp_path / "more", ["--set", "ink=1"]),
        ("both", tmp_path / "more", ["--set", "ink=1", "--set", "slant=left"]),
        ("new", tmp_path / "more", ["--set", "slant=left"]),
    ):
        done = ctrl_here("sample", run, *asked, "-n", 4, "--quiet", "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        pictures[name] = [(tmp_path / name / f"0000{i}.png").read_bytes() for i in range(4)]
    assert pictures["nulled"] == pictures["old"]
    assert pictures["both"] != pictures["old"]
    with (tmp_path / "new" / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["ink"], row["slant"]) for row in rows] == [("", "left")] * 4
    metrics = json.loads((tmp_path / "more" / "metrics.json").read_text())
    assert {"ink", "slant"} <= set(metrics["controls"])
    # a third, on a run of two
    done = ctrl_here(*["add", both, *add[2:4], "--control", "slant", "--config", settings], "--out", tmp_path / "third")
    assert (done.returncode, done.stderr) == (
        2,
        "ctrl: settings: two controls are named 'slant'. Name every control once.\n",
    )
    assert not (tmp_path / "third").exists()


def test_a_control_is_added_to_the_run_that_ships_by_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train_with", lambda settings, out, options: settings)
    settings = train.add_job("ink", {"data": "-", "control": "slant"}, tmp_path / "out")
    assert [Path(control.get("settled_from", "")) for control in settings["controls"]] == [INK, Path()]
