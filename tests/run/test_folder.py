"""Where a run folder keeps its files, and what state it is in."""

import pytest

from ctrl_diffusion import Run, resume_job
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


def test_a_moved_prior_is_named_with_the_key_to_change(folder, tmp_path):
    """Also where a run is opened, before anything else of it is."""
    settings("ink").with_(prior=str(tmp_path / "pipeline")).write(folder.config)
    for part in ("classifier", "control"):
        (folder.path / part).mkdir()
    message = rf"run/config\.yaml: there is no {tmp_path}/pipeline. If it was moved, change prior: in that file\."
    for read in (folder.read_config, lambda: Run.load(folder.path), lambda: resume_job(folder.path)):
        with pytest.raises(ValueError, match=message):
            read()
    (tmp_path / "pipeline").mkdir()
    assert folder.read_config().prior == str(tmp_path / "pipeline")
    settings("ink").with_(prior="digits").write(folder.config)
    assert folder.read_config().prior == "digits"
