"""Where a run folder keeps its files, and what state it is in."""

import re

import pytest

from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.folder import RunFolder, StartRecord, fixed_settings


def settings(*names, **rest):
    return Config.from_values({"prior": "-", "controls": [{"name": name, "data": "-"} for name in names], **rest})


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def start():
    return StartRecord("ctrl train", {"classifier": 0.1 + 0.2}, {"ink": 500}, {}, fixed_settings(settings("ink")))


@pytest.mark.parametrize("name", ["ink", "judge"])  # the folder of a classifier has one called judge
def test_one_control_has_the_folder_to_itself(folder, name):
    settings(name).write(folder.config)
    (folder.path / "classifier" / name).mkdir(parents=True)
    assert folder.classifier(name) == folder.path / "classifier"
    assert folder.control(name) == folder.path / "control"


def test_of_several_controls_each_has_a_folder(folder):
    settings("ink", "slant").write(folder.config)
    assert folder.control("slant") == folder.path / "control" / "slant"


def test_the_state_of_a_run_can_be_read_off_its_folder(folder, start):
    assert not folder.is_finished
    folder.clear()
    folder.write_start(start)
    assert folder.is_ours
    folder.report.write_text("written, but the states are still there")
    assert folder.has_begun
    assert not folder.is_finished
    folder.clear_checkpoint()
    assert folder.is_finished
    assert not folder.start.parent.exists()


def test_the_start_record_comes_back_to_the_last_digit(folder, start):
    folder.write_start(start)
    assert folder.read_start() == start


def test_settings_that_training_depends_on_may_not_change(folder, start):
    folder.write_start(start)
    folder.check_unchanged(settings("ink", device="cpu"))
    with pytest.raises(ValueError, match=r"config\.yaml: rank was 64 and is 3\. Put it back to go on"):
        folder.check_unchanged(settings("ink", rank=3))


def test_clearing_leaves_what_is_not_ours(folder):
    folder.clear()
    for name in ("thesis.txt", "metrics.json", "data"):
        (folder.path / name).write_text("x")
    folder.clear()
    assert {path.name for path in folder.path.iterdir()} == {"thesis.txt", "data", folder.log.name}


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("prior", "config.yaml: prior: {old} is not there. If it has moved, write its new place after prior: there."),
        ("data", "config.yaml: controls.0.data: {old} is not there"),
        ("judge_data", "config.yaml: controls.0.judge_data: {old} is not there"),
        ("classifier_from", "config.yaml: controls.0.classifier_from: {old} is not there"),
        ("settled_from", "config.yaml: controls.0.settled_from: {old} is not there"),
    ],
)
def test_what_has_moved_is_named_by_its_key(folder, tmp_path, key, line):
    """Whatever has moved, and only where it is needed; names on a hub and the embedded prior are no paths."""
    folder.path.mkdir(exist_ok=True)
    old = tmp_path / "old"
    values = {"prior": "digits", "control": "ink", "data": "someone/pictures"}
    Config.from_values(values).write(folder.config)
    assert folder.read_config("prior", "data", "settled_from").prior == "digits"
    Config.from_values(values | {key: str(old)}).write(folder.config)
    with pytest.raises(ValueError, match=re.escape(line.format(old=old))):
        folder.read_config(key)
    assert folder.read_config("size")
    old.mkdir()
    assert folder.read_config(key)


@pytest.mark.parametrize(
    ("file", "read", "content"),
    [
        ("start", "read_start", "{"),
        ("start", "read_start", "[]"),
        ("start", "read_start", '{"command": "ctrl"}'),
        ("start", "read_start", '{"command": 1, "seconds": {}, "labels": {}, "dependence": {}, "fixed": {}}'),
        ("start", "read_start", '{"command": "", "seconds": 3, "labels": {}, "dependence": {}, "fixed": {}}'),
        ("start", "read_start", '{"command": "", "seconds": {}, "labels": {}, "depndence": {}, "fixed": {}}'),
        ("metrics", "read_metrics", "nul"),
        ("metrics", "read_metrics", "3"),
        ("metrics", "read_metrics", "\x00"),
    ],
)
def test_a_damaged_record_is_one_line(folder, file, read, content):
    path = getattr(folder, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: .*\. (Begin|Remove)") as error:
        getattr(folder, read)()
    assert "\n" not in str(error.value)
