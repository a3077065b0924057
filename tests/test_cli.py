"""The command line in a process of its own, as a user runs it."""

import csv
import json
import re
import shutil
from importlib.metadata import version

import pytest
import yaml

from ctrl_diffusion.config import Config
from ctrl_diffusion.run import run_demo

REQUIRED = {
    "prior": {"accuracy"},
    "target": {"accuracy", "class_accuracy", "diversity"},
    "ctrl": {"accuracy", "macro_f1", "class_accuracy", "diversity_ratio", "kl_nats"},
    "certificate": {"objective_nats", "log_z_nats", "log_z_policy_nats", "gap_nats", "gap_stderr", "ess_fraction"},
    "classifier": {"accuracy", "nll", "ece", "temperature"},
    "seconds": {"classifier", "train", "sample", "total"},
    "versions": {"torch", "diffusers", "peft"},
}


def test_version_and_help(ctrl):
    assert ctrl("--version").stdout.strip() == version("ctrl-diffusion")
    for command in ("demo", "sample", "evaluate"):
        text = ctrl(command, "--help").stdout
        assert "Example: ctrl " + command in text
        assert len(text.splitlines()) <= 40


def test_demo_leaves_a_whole_run(quick_run):
    metrics = json.loads((quick_run / "metrics.json").read_text())
    for group, names in REQUIRED.items():
        assert names <= set(metrics[group])
    assert metrics["ctrl"]["accuracy"] > metrics["prior"]["accuracy"]
    assert metrics["certificate"]["gap_nats"] == pytest.approx(
        metrics["certificate"]["log_z_nats"] - metrics["certificate"]["objective_nats"], abs=1e-3
    )
    names = {path.name for path in quick_run.iterdir()}
    assert {"config.yaml", "data", "classifier", "control", "reader", "progress.jsonl", "samples"} <= names
    assert {"grid.png", "curves.png", "reliability.png", "report.html"} <= names
    assert not [name for name in names if name.startswith(".")], "temporary files left behind"
    records = [json.loads(line) for line in (quick_run / "progress.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"weighted", "adjoint"}
    with (quick_run / "samples" / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["digit"], row["ink"]) for row in rows[:5]] == [
        ("0", "1"),
        ("0", "2"),
        ("0", "3"),
        ("0", "4"),
        ("1", "1"),
    ]


def test_the_report_needs_nothing_from_outside(quick_run):
    page = (quick_run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "{{" not in page


def test_sample_writes_labelled_pictures(ctrl, quick_run, tmp_path):
    done = ctrl(
        "sample",
        quick_run,
        "--set",
        "ink=3",
        "--class",
        7,
        "-n",
        5,
        "--steps",
        8,
        "--strength",
        1.5,
        "--out",
        tmp_path / "a",
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "a" / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["digit"], row["ink"]) for row in rows] == [("7", "3")] * 5
    assert len(list((tmp_path / "a").glob("0*.png"))) == 5
    assert (tmp_path / "a" / "grid.png").is_file()


def test_sample_seed_strength_and_null(ctrl, quick_run, tmp_path):
    options = {
        "prior": [],
        "strength-0": ["--set", "ink=1", "--strength", "0"],
        "again": [],
        "other-seed": ["--seed", "1"],
        "light": ["--set", "ink=1"],
    }
    pictures = {}
    for name, arguments in options.items():
        done = ctrl("sample", quick_run, "-n", 3, "--quiet", "--out", tmp_path / name, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pictures[name] = [(tmp_path / name / f"0000{i}.png").read_bytes() for i in range(3)]
    assert pictures["prior"] == pictures["again"] == pictures["strength-0"]
    assert pictures["prior"] != pictures["other-seed"]
    assert pictures["prior"] != pictures["light"]


def test_evaluate(ctrl, quick_run, tmp_path):
    done = ctrl("evaluate", quick_run, "-n", 80, "--out", tmp_path / "figures.json", "--quiet")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ctrl"]["samples"] == 80
    assert {len(column) for column in figures["certificate"]["pairs"].values()} == {40}
    # the prior's samples depend on the run's seed alone, not on n
    assert figures["target"] == json.loads((quick_run / "metrics.json").read_text())["target"]


TINY = {
    "weighted": {"updates": 3, "batch": 16, "cache": 8},
    "adjoint": {"updates": 3, "batch": 8},
    "evaluation": {"prior_samples": 8, "paths": 80, "probes": 1},
    "steps": 4,
    "rank": 4,
}


@pytest.mark.filterwarnings("ignore:log Z")
def test_one_seed_the_same_bytes(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        run_demo(Config.of(TINY), folder)
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert files[0] == files[1]
    for name in files[0]:
        a, b = ((folder / name).read_bytes() for folder in folders)
        if name.name == "metrics.json":
            a, b = ({k: v for k, v in json.loads(text).items() if k != "seconds"} for text in (a, b))
        if name.name != "report.html":  # it quotes the seconds
            assert a == b, name


def test_a_run_can_be_made_again_in_its_own_folder_but_not_over_other_files(tmp_path):
    (tmp_path / "thesis.txt").write_text("not a run")
    with pytest.raises(ValueError, match="is no run"):
        run_demo(Config.of(TINY), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "config.yaml").write_text("somebody: else's\n")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="somebody: Extra inputs"):
        run_demo(Config.of(TINY), tmp_path)
    assert (tmp_path / "data").is_dir()


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_run_made_again_replaces_the_old_one_only(tmp_path):
    run_demo(Config.of(TINY), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "control" / "control.safetensors").read_bytes()
    run_demo(Config.of({**TINY, "seed": 1}), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "control" / "control.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{tmp}/missing", "--out", "{tmp}/o"], "there is no folder"),
        (["sample", "{tmp}", "--out", "{tmp}/o"], "is not a run folder"),
        (["sample", "{run}", "--set", "slant=1", "--out", "{tmp}/o"], "unknown control 'slant'; this run has: ink"),
        (["sample", "{run}", "--set", "ink=9", "--out", "{tmp}/o"], "ink must be one of 1, 2, 3, 4, got '9'"),
        (["sample", "{run}", "--set", "ink", "--out", "{tmp}/o"], "ink must be one of 1, 2, 3, 4, got ''"),
        (["sample", "{run}", "--class", "11", "--out", "{tmp}/o"], "--class must lie in 0 … 9, got 11"),
        (["sample", "{run}", "--steps", "5000", "--out", "{tmp}/o"], "fewer than 5000 distinct times"),
        (["sample", "{run}", "--out", "{run}"], "is not empty"),
        (["sample", "{run}", "-n", "0", "--out", "{tmp}/o"], "Invalid value for '-n'"),
        (["evaluate", "{typo}"], "gama: Extra inputs are not permitted"),
        (["evaluate", "{unfinished}"], "unfinished run: it lacks control"),
        (["evaluate", "{damaged}"], "is damaged"),
        (["demo", "--seed", str(2**32), "--out", "{tmp}/o"], "Invalid value for '--seed'"),
        (["demo", "--learner", "magic", "--out", "{tmp}/o"], "learners.0: Input should be"),
        (["demo", "--seed", "-1", "--out", "{tmp}/o"], "Invalid value for '--seed'"),
        (["demo", "--quick", "--out", "{file}"], "is no run"),
    ],
)
def test_bad_input_is_one_clear_line(ctrl, quick_run, tmp_path, arguments, message):
    typo, unfinished = tmp_path / "typo", tmp_path / "unfinished"
    shutil.copytree(quick_run, typo)
    config = yaml.safe_load((typo / "config.yaml").read_text())
    (typo / "config.yaml").write_text(yaml.safe_dump({**config, "gama": 2.0}))
    shutil.copytree(quick_run, unfinished)
    shutil.rmtree(unfinished / "control")
    damaged = tmp_path / "damaged"
    shutil.copytree(quick_run, damaged)
    weights = damaged / "control" / "control.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "file").write_text("")
    places = {"tmp": tmp_path, "run": quick_run, "typo": typo, "unfinished": unfinished, "damaged": damaged}
    places["file"] = tmp_path / "file"
    done = ctrl(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists(), "nothing half-written"
