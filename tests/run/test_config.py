"""What a config accepts, what it refuses and how it is changed."""

import pytest
import yaml
from pydantic import ValidationError

from ctrl_diffusion.run.config import Config, list_controls, with_overrides
from ctrl_diffusion.run.defaults import quick
from ctrl_diffusion.system.progress import seconds_in

LEAST = {"prior": "digits", "control": "ink", "data": "photos"}
TWO = {"prior": "digits", "controls": [{"name": "ink", "data": "a"}, {"name": "slant", "data": "b"}]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gama": 2}, r"^settings: gama: .*got 2 \(did you mean gamma\?\)"),
        ({"adjoint": {"clp": 5}}, r"adjoint\.clp: .*\(did you mean clip\?\)"),
        ({"classifier": {"hed": "auto"}}, r"controls\.0\.classifier\.hed: .*\(did you mean head\?\)"),
        ({"xyz": 1}, r"xyz: .*got 1\. A fresh run's"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"learners": ["magic"]}, "learners"),
    ],
)
def test_a_wrong_key_or_value_is_one_line(values, message):
    with pytest.raises(ValueError, match=message) as refused:
        Config.from_values({**LEAST, **values})
    assert "\n" not in str(refused.value)


def test_two_controls_of_one_name_are_refused():
    values = {**TWO, "controls": [TWO["controls"][0]] * 2}
    with pytest.raises(ValueError, match="two controls are named 'ink'"):
        Config.from_values(values)


def test_a_single_control_needs_no_list():
    flat = Config.from_values({**LEAST, "control": "ink:weight=dark", "classifier": {"updates": 7}})
    row = {"name": "ink", "column": "weight", "tag": "dark", "data": "photos", "classifier": {"updates": 7}}
    assert flat == Config.from_values({"prior": "digits", "controls": [row]})
    with pytest.raises(ValueError, match="data: there are several controls"):
        list_controls({**TWO, "data": "photos"})


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "data").mkdir()
    elsewhere = str(tmp_path.parent / "elsewhere")
    config = Config.from_values({**LEAST, "data": str(tmp_path / "data"), "judge_data": elsewhere})
    config.write(tmp_path / "config.yaml")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (written["prior"], written["controls"][0]["data"]) == ("digits", "data")
    assert written["controls"][0]["judge_data"] == elsewhere
    assert Config.read(tmp_path / "config.yaml") == config
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "config.yaml").rename(moved / "config.yaml")
    assert Config.read(moved / "config.yaml").controls[0].data == str(moved / "data")


def test_a_config_does_not_change_but_gives_changed_copies():
    config = Config.from_values(LEAST)
    for group, name in ((config, "gamma"), (config.adjoint, "clip"), (config.controls[0], "data")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(group, name, getattr(group, name))
    changed = config.with_(gamma=2, adjoint={"clip": 5})
    assert (changed.gamma, changed.adjoint.clip, changed.adjoint.batch) == (2.0, 5.0, config.adjoint.batch)
    assert (config.gamma, config.adjoint.clip) == (1.0, 10.0)
    with pytest.raises(ValueError, match="gamma: Input should be greater"):
        config.with_(gamma=-1)


def test_quick_leaves_a_classifier_that_is_handed_over():
    values = {**TWO, "controls": [TWO["controls"][0] | {"classifier_from": "folder"}, TWO["controls"][1]]}
    config = Config.from_values(values)
    small = quick(config)
    assert [c.classifier.updates for c in small.controls] == [1500, 375]
    assert (small.adjoint.updates, small.weighted.renoising, small.evaluation.paths) == (40, 8, 160)


def overridden(values, *overrides, **options):
    return Config.from_values(with_overrides(values, overrides, options))


def test_an_override_has_the_type_of_its_key():
    texts = ("gamma=2", "adjoint.clip=1e-3", "offload=yes", "classes=[3, 7]", "micro_batch=null", "mixed_precision=no")
    config = overridden({**LEAST, "micro_batch": 4, "adjoint": {"batch": 8}}, *texts)
    assert (config.gamma, config.adjoint.clip, config.offload, config.classes) == (2.0, 1e-3, True, [3, 7])
    assert (config.micro_batch, config.mixed_precision, config.adjoint.batch) == (None, "no", 8)
    with pytest.raises(ValueError, match="steps: Input should be a valid integer.* got 'many'"):
        overridden(LEAST, "steps=many")


@pytest.mark.parametrize("key", ["controls.0.classifier.updates", "classifier.updates"])
@pytest.mark.parametrize("listed", [False, True])
def test_an_override_reaches_a_single_control_in_both_forms(key, listed):
    values = {**LEAST, "classifier": {"grid": 2, "updates": 9}}
    config = overridden(list_controls(values) if listed else values, f"{key}=100")
    assert (config.controls[0].classifier.updates, config.controls[0].classifier.grid) == (100, 2)


def test_an_override_reaches_one_of_several_controls():
    assert [c.skip_bad for c in overridden(TWO, "controls.1.skip_bad=true").controls] == [False, True]
    with pytest.raises(ValueError, match="classifier: there are several controls"):
        overridden(TWO, "classifier.updates=100")


def test_options_win_over_overrides_and_these_over_the_file():
    values = {**LEAST, "gamma": 1, "steps": 5, "seed": 1}
    config = overridden(values, "gamma=2", "steps=6", "data=other", gamma=3.0, data="mine")
    assert (config.gamma, config.steps, config.seed, config.controls[0].data) == (3.0, 6, 1, "mine")
    # the controls of the command line are the controls; what it does not say of them may be overridden
    rows = [{"name": "a", "data": "x"}, {"name": "b", "data": "y"}]
    config = overridden(TWO, "controls.1.data=z", "controls.1.ruler=ink", controls=rows)
    assert [(c.name, c.data, c.ruler) for c in config.controls] == [("a", "x", None), ("b", "y", "ink")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adjont.clip=5", r"adjont: .*\(did you mean adjoint\?\)"),
        ("adjoint.clipp=5", r"adjoint\.clipp: .*\(did you mean clip\?\)"),
        ("controls.0.classifer.updates=5", r"controls\.0\.classifer: .*\(did you mean classifier\?\)"),
        ("controls.2.data=x", r"-o controls\.2\.data=x: 2 must be a number from 0 to 0"),
        ("controls.ink.data=x", "ink must be a number"),
        ("steps", "-o steps: give KEY=VALUE, such as adjoint.clip=5"),
        ("=5", "-o =5: give KEY=VALUE"),
        ("classes=[3", r"-o classes=\[3: "),
        ("adjoint.clip.x=5", r"adjoint\.clip: Input should be a valid number"),
        ("controls=5", "controls: Input should be a valid list"),
        ("controls.0=5", "controls.0: Input should be a valid dict"),
    ],
)
def test_a_wrong_override_is_one_line(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        overridden(LEAST, text)
    assert "\n" not in str(refused.value)


COMMANDS = {
    "train": ["--prior", "digits", "--control", "ink", "--data", "photos", "--out", "out"],
    "train --dry-run": ["--prior", "digits", "--control", "ink", "--data", "photos"],
    "demo": ["--out", "out"],
    "classifier": ["photos", "--control", "ink", "--out", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_with_a_config_takes_overrides(ctrl_here, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    done = ctrl_here(*command.split(), *COMMANDS[command], "-o", "adjont.clip=5")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "adjont: " in done.stderr
    assert "(did you mean adjoint?)" in done.stderr
    done = ctrl_here(*command.split(), *COMMANDS[command], "--override", "adjoint.clip=-5")
    assert "adjoint.clip: Input should be greater than 0, got -5" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_resumed_training_takes_no_override(ctrl_here, tmp_path):
    done = ctrl_here("train", "--resume", tmp_path, "-o", "steps=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Leave the other options out" in done.stderr


def test_an_added_control_takes_no_override_of_the_old_run(ctrl_here, quick_run, tmp_path):
    add = ("add", quick_run, "--data", "photos", "--control", "slant", "--out", tmp_path / "out")
    done = ctrl_here(*add, "-o", "gamma=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "-o gamma=3: gamma is that of" in done.stderr
    assert "(did you mean adjoint?)" in ctrl_here(*add, "-o", "adjont.clip=5").stderr


def test_code_that_an_override_names_is_trusted(ctrl_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yaml").write_text("column: somebodys:label\n")
    train = ("train", *COMMANDS["train"], "--config", "theirs.yaml")
    assert "theirs.yaml runs code: somebodys:label" in ctrl_here(*train).stderr
    assert "runs code" not in ctrl_here(*train, "-o", "column=somebodys:label").stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1h", 3600), ("1h30m", 5400), ("0.5h", 1800), (" 2m5s ", 125), ("1h1s", 3601)],
)
def test_a_time_is_read(text, seconds):
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0s", "-5m", "1d", "5m2h", "1..5h", "half an hour"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is no time"):
        seconds_in(text)
