"""Trainings on a user's own data, and what the jobs refuse before they start."""

import csv
import json
import re
import shutil

import pytest
import yaml
from tiny import TINY

from ctrl_diffusion.commands.jobs import train as job
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.commands.jobs.train import classifier_job
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.data.read import read_images
from ctrl_diffusion.run.config import ControlSettings
from ctrl_diffusion.system.progress import JobOptions


def test_a_classifier_is_not_written_over_somebody_elses_files(tmp_path, tmp_path_factory):
    data = tmp_path_factory.mktemp("digits")
    write_imagefolder(data, labelled_digits("ink", 0)[0][0])
    settings = ControlSettings(name="ink", data=str(data))
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite, message in ((False, "--overwrite"), (True, r"no classifier\.json of ours")):
        with pytest.raises(ValueError, match=message):
            classifier_job(settings, tmp_path, options=JobOptions(overwrite=overwrite))
    with pytest.raises(ValueError, match="is a file"):
        classifier_job(settings, tmp_path / "thesis.txt" / "under")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_classifier_is_fitted_as_the_config_of_a_training_says(tmp_path, monkeypatch, ctrl_here):
    """The same file serves `ctrl classifier` and `ctrl train`."""
    for name, data in zip(("data", "others"), labelled_digits("ink", 0)[0], strict=True):
        write_imagefolder(tmp_path / name, data)
    text = "kind: scale\njudge_data: others\ncondition: digit\nclassifier: {updates: 7}\nsteps: 5\n"
    (tmp_path / "mine.yaml").write_text(text)

    def fitted(data, name, condition, **rest):
        found = data.space(name).scale, condition, len(rest["judge_data"]), rest["settings"].updates
        raise ValueError(f"{found}")

    monkeypatch.setattr(job, "fit_panel", fitted)
    asked = ["classifier", tmp_path / "data", "--control", "ink", "--config", tmp_path / "mine.yaml"]
    done = ctrl_here(*asked, "--out", tmp_path / "out", "--quiet")
    assert done.stderr == "ctrl: (True, 'digit', 1297, 7)\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_a_config_makes_the_run_again(tmp_path, ctrl):
    demo_job({**TINY, "learners": ["weighted", "adjoint"]}, tmp_path / "a")
    done = ctrl("train", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "b", "--quiet")
    assert done.returncode == 0, done.stderr
    for name in ("control/control.safetensors", "classifier/classifier.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, b = (yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in "ab")
    for name in ("data", "judge_data"):
        found = (run["controls"][0].pop(name) for run in (a, b))
        assert tuple(found) == (name, str(tmp_path / "a" / name))
    assert a == b
    # an option wins over the file
    done = ctrl("train", "--config", tmp_path / "a" / "config.yaml", "--out", tmp_path / "c", "--quiet", "--steps", 5)
    assert yaml.safe_load((tmp_path / "c" / "config.yaml").read_text())["steps"] == 5


@pytest.mark.filterwarnings("ignore:log Z")
def test_classifier_and_train_on_the_users_own_folder(ctrl_here, quick_run, tmp_path):
    """The commands a user types, on the demo's data: a judge instead of the ruler, the classifier handed over."""
    data, fitted, run = quick_run / "data", tmp_path / "fitted", tmp_path / "run"
    settings = tmp_path / "tiny.yaml"
    settings.write_text(yaml.safe_dump(TINY))
    about = ["--control", "ink", "--condition", "digit", "--config", settings]
    done = ctrl_here("classifier", data, *about, "--out", fitted)
    assert done.returncode == 0, done.stderr
    assert "ink on held-out images: accuracy" in done.stdout
    names = {path.name for path in fitted.iterdir()}
    assert names == {
        "classifier.json", "classifier.safetensors", "judge", "reader", "reliability.png", "confusion.png",
        "report.html", "support.safetensors",
    }  # fmt: skip
    train = ["train", "--prior", "digits", "--data", data, *about]
    done = ctrl_here(*train, "--classifier", fitted, "--gamma", 0.5, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "ink as asked, by the judge" in done.stdout
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["accuracy_by"] == "judge"
    assert metrics["classifier"]["judge_accuracy"] > 0.5
    assert (run / "classifier" / "classifier.safetensors").read_bytes() == (
        fitted / "classifier.safetensors"
    ).read_bytes()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["gamma"], config["classes"]) == (0.5, list(range(10)))
    assert config["controls"][0]["data"] == str(data)
    done = ctrl_here("sample", run, "--set", "ink=2", "-n", 2, "--out", tmp_path / "two", "--quiet")
    assert done.returncode == 0, done.stderr
    done = ctrl_here("evaluate", run, "-n", 80, "--quiet")
    assert json.loads(done.stdout)["accuracy_by"] == "judge"


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_control_on_a_scale_is_asked_for_by_value(ctrl_here, quick_run, tmp_path):
    """From a table whose columns have other names, with a row nobody can use."""
    data = read_images(quick_run / "data", {"digit": None}, (1, 8, 8))
    rows = [
        f"{i:05d}.png,{digit},{ink:.5f}"
        for i, (digit, ink) in enumerate(zip(data.labels["digit"].tolist(), rulers.ink(data.x).tolist(), strict=True))
    ]
    folder = tmp_path / "photos"
    shutil.copytree(quick_run / "data", folder)
    (folder / "measured.csv").write_text("\n".join(["image,class,grey", *rows, "missing.png,3,0.3"]))
    settings = tmp_path / "tiny.yaml"
    own = {"classifier": {"grid": 1, "depth": 1, "augment": "any_side_up", "updates": 600}, "ruler": "ink"}
    enough = {"evaluation": {**TINY["evaluation"], "prior_samples": 18}}  # for nine levels
    settings.write_text(yaml.safe_dump({**TINY, **own, **enough}))
    train = ["train", "--prior", "digits", "--data", folder / "measured.csv", "--control", "ink:grey"]
    train += ["--condition", "digit:class", "--config", settings, "--quiet"]
    done = ctrl_here(*train, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "measured.csv row 501: cannot read 'missing.png'" in done.stderr
    done = ctrl_here(*train, "--skip-bad", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "1 of 501 rows cannot be used (1 × unreadable images; the first:" in done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["classifier"]["r2"] > 0.9
    assert metrics["scale"]["ink"]["samples"] == 40
    assert metrics["scale"]["ink"]["r2"] < 1
    assert (tmp_path / "run" / "scale-ink.png").is_file()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Requested and measured" in page
    assert "None" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.S)
    assert "None" not in (tmp_path / "run" / "classifier" / "report.html").read_text()
    done = ctrl_here("sample", tmp_path / "run", "--set", "ink=0.31", "-n", 3, "--out", tmp_path / "some", "--quiet")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "some" / "metadata.csv").open() as file:
        assert [row["ink"] for row in csv.DictReader(file)] == ["0.31"] * 3
    for value in ("0.95", "dark"):
        done = ctrl_here("sample", tmp_path / "run", "--set", f"ink={value}", "--out", tmp_path / "none")
        assert done.returncode == 2
        assert "ink must be a number in 0.2" in done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_two_tags_of_one_column_are_two_controls(ctrl_here, quick_run, tmp_path):
    """The multi-label case: one column lists what is true of an image, and each tag is asked for or left out."""
    data = tmp_path / "data"
    shutil.copytree(quick_run / "data", data)
    lines = [line.split(",") for line in (data / "metadata.csv").read_text().splitlines()[1:]]
    rows = [
        f"{name},{';'.join(['heavy'] * (ink > '2') + ['even'] * (int(digit) % 2 == 0))}" for name, digit, ink in lines
    ]
    (data / "metadata.csv").write_text("\n".join(["file_name,tags", *rows]))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({k: v for k, v in TINY.items() if k != "classifier"}))
    given = [part for tag in ("heavy", "even") for part in ("--data", data, "--control", f"{tag}:tags={tag}")]
    run = tmp_path / "run"
    done = ctrl_here("train", "--prior", "digits", *given, "--config", tmp_path / "tiny.yaml", "--quiet", "--out", run)
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load((run / "config.yaml").read_text())["controls"]
    assert [(one["name"], one["column"], one["tag"]) for one in written] == [
        ("heavy", "tags", "heavy"), ("even", "tags", "even")
    ]  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"heavy", "even"} <= set(metrics["controls"])
    assert "heavy and even" in metrics["dependence"]
    done = ctrl_here("sample", run, "--set", "even=yes", "--set", "heavy=no", "-n", 2, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two" / "metadata.csv").read_text().splitlines()[0] == "file_name,c,heavy,even"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control", "ink", "--control", "slant"], "--data is given 1 times, --control 2 times"),
        (["--control", "ink", "--control", "ink", "--data", "{data}"], "two controls are named 'ink'"),
        (["--control", "ink", "--classifier", "a", "--classifier", "b"], "--classifier is given 2 times"),
        (["--config", "{config}"], "data: there are several controls"),
    ],
)
def test_several_controls_are_given_in_turn(ctrl_here, both, tmp_path, arguments, message):
    names = {"data": both / "data" / "ink", "config": both / "config.yaml"}
    given = [text.format(**names) for text in arguments]
    done = ctrl_here("train", "--prior", "digits", "--data", names["data"], *given, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
