"""The command line in a process of its own, as a user runs it."""

import csv
import json
import math
import re
import shutil
import warnings
from importlib.metadata import version

import pytest
import torch
import yaml
from PIL import Image

from ctrl_diffusion.commands.jobs import demo
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.read import read_images
from ctrl_diffusion.run import prepare, stages
from ctrl_diffusion.run.measure import outside_share
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.progress import JobOptions

REQUIRED = {
    "prior": {"accuracy"},
    "sweep": {"strength", "steps"},
    "target": {"accuracy", "class_accuracy", "diversity"},
    "ctrl": {"accuracy", "macro_f1", "judge_accuracy", "class_accuracy", "diversity_ratio", "kl_nats"},
    "certificate": {"objective_nats", "log_z_nats", "log_z_policy_nats", "gap_nats", "gap_stderr", "ess_fraction"},
    "classifier": {"accuracy", "nll", "ece", "temperature"},
    "seconds": {"classifier", "train", "sample", "total"},
    "versions": {"torch", "diffusers", "peft"},
}


def test_version_and_help(ctrl, ctrl_here):
    assert ctrl("--version").stdout.strip() == version("ctrl-diffusion")
    overview = ctrl_here("--help").stdout
    for command in "demo classifier inspect train add sample evaluate compare export exact".split():
        assert command in overview
        text = ctrl_here(command, "--help").stdout
        assert "Example: ctrl " + command in " ".join(text.split())
        assert len(text.splitlines()) <= 24, "a screen"


def test_demo_leaves_a_whole_run(quick_run):
    metrics = json.loads((quick_run / "metrics.json").read_text())
    for group, names in REQUIRED.items():
        assert names <= set(metrics[group])
    assert metrics["accuracy_by"] == "ruler"
    assert metrics["ctrl"]["accuracy"] > metrics["prior"]["accuracy"]
    # the judge knows 1,297 other digits: it must agree with the ruler about nearly every sample
    assert metrics["ctrl"]["judge_accuracy"] == pytest.approx(metrics["ctrl"]["accuracy"], abs=0.1)
    strengths = {row["strength"]: row for row in metrics["sweep"]["strength"]}
    assert list(strengths) == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [row["steps"] for row in metrics["sweep"]["steps"]] == [3, 6, 12]
    assert strengths[0.0]["accuracy"] < strengths[1.0]["accuracy"]
    assert metrics["certificate"]["gap_nats"] == pytest.approx(
        metrics["certificate"]["log_z_nats"] - metrics["certificate"]["objective_nats"], abs=1e-3
    )
    names = {path.name for path in quick_run.iterdir()}
    assert {"config.yaml", "data", "judge_data", "classifier", "control", "progress.jsonl", "samples"} <= names
    pictures = {"grid.png", "curves.png", "accuracy.png", "confusion.png", "reliability.png", "sweep.png"}
    assert pictures | {"report.html"} <= names
    assert not [name for name in names if name.startswith(".")], "temporary files left behind"
    assert len({path.stat().st_mode for path in quick_run.rglob("*") if path.is_file()}) == 1, "all may be read alike"
    records = [json.loads(line) for line in (quick_run / "progress.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(record["stage"] for record in records)) == ["re-noising", "weighted", "adjoint"]
    kept = {key: value for key, value in records[-1].items() if key != "kept"}
    assert records[-1]["kept"]
    assert kept in [record for record in records[:-1] if "J" in record and record["stage"] != "re-noising"]
    assert {key: metrics["training"]["kept"][key] for key in ("stage", "update")}.items() <= kept.items()
    assert [stage["stage"] for stage in metrics["training"]["stages"]] == ["re-noising", "weighted", "adjoint"]
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
    for report, pictures in (("report.html", 6), ("classifier/report.html", 2)):
        page = (quick_run / report).read_text()
        assert page.count("data:image/png;base64,") == pictures
        assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import", page)
        assert "{{" not in page
        assert "object at 0x" not in page
    page, kept = ((quick_run / name).read_text() for name in ("report.html", "metrics.json"))
    assert "ctrl demo --quick --out" in page, "the exact command"
    kept = json.loads(kept)["training"]["kept"]
    assert f"update {kept['update']} of {kept['stage']}" in page


def test_sample_writes_labelled_pictures(ctrl_here, quick_run, tmp_path):
    done = ctrl_here(
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


def test_sample_seed_strength_and_null(ctrl_here, quick_run, tmp_path):
    options = {
        "prior": [],
        "strength-0": ["--set", "ink=1", "--strength", "0"],
        "again": [],
        "other-seed": ["--seed", "1"],
        "light": ["--set", "ink=1"],
    }
    pictures = {}
    for name, arguments in options.items():
        done = ctrl_here("sample", quick_run, "-n", 3, "--quiet", "--out", tmp_path / name, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pictures[name] = [(tmp_path / name / f"0000{i}.png").read_bytes() for i in range(3)]
    assert pictures["prior"] == pictures["again"] == pictures["strength-0"]
    assert pictures["prior"] != pictures["other-seed"]
    assert pictures["prior"] != pictures["light"]


def test_exact_samples_are_drawn_by_weight(ctrl_here, quick_run, tmp_path):
    """Strength 0 draws them from the prior alone, of which a third has this ink: no smoke test's control is needed."""
    asked = ["sample", quick_run, "--set", "ink=2", "--class", 7, "-n", 8, "--strength", 0, "--steps", 8]
    for name, more in (("exact", ["--exact"]), ("again", ["--exact"]), ("plain", [])):
        done = ctrl_here(*asked, *more, "--quiet", "--out", tmp_path / name)
        assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "exact" / "sample.json").read_text())["exact"] is True
    shape = (1, 8, 8)
    ink = {
        name: rulers.ink_ruler(read_images(tmp_path / name, {"digit": None}, shape).x) for name in ("exact", "plain")
    }
    assert (ink["exact"] == 1).sum() >= 6, "p̂ and the ruler disagree at the borders only"
    assert (ink["plain"] == 1).sum() < 6
    assert (tmp_path / "exact" / "00003.png").read_bytes() == (tmp_path / "again" / "00003.png").read_bytes()


def test_exact_samples_are_weighed_in_full_precision(quick_run):
    """The weight of a path in bfloat16 is of its rounding."""
    run, y, c = Run.load(quick_run), torch.tensor([1]), torch.tensor([7])
    full, half = (
        run.sample(y, c, steps=5, exact=True, generator=torch.Generator().manual_seed(0))
        for run.policy.base.precision in (None, torch.bfloat16)
    )
    assert torch.equal(full, half)


def test_samples_that_leave_the_labelled_region_are_told(quick_run, tmp_path, ctrl_here):
    """Real digits are within, noise is not; what `ctrl sample` draws is counted."""
    run = Run.load(quick_run)
    real = demo.labelled_digits("ink", 0)[0][1].x[:200]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        within = outside_share(run, real, real)
    # conformal on 150 calibration and held-out images: 5 % ± 2 %, and three standard errors of 200
    assert within < 0.05 + 2 * 0.02 + 3 * 0.015
    noise = torch.randn(200, 1, 8, 8)
    assert run.prior_outside == json.loads((quick_run / "metrics.json").read_text())["prior"]["outside_support"]
    with pytest.warns(RuntimeWarning, match=r"\d+% of the samples lie outside the region .* of the prior's \d+%"):
        assert outside_share(run, noise, noise) > 0.5
    asked = ["sample", quick_run, "--set", "ink=2", "-n", 20, "--quiet", "--out", tmp_path / "drawn"]
    assert ctrl_here(*asked).returncode == 0
    drawn = run.sample(
        torch.full((20,), 1), torch.arange(20) % 10, generator=torch.Generator().manual_seed(0), latents=True
    )  # fmt: skip
    told = json.loads((tmp_path / "drawn" / "sample.json").read_text())["outside_support"]
    assert told == pytest.approx(outside_share(run, drawn, drawn))


@pytest.mark.slow
def test_exact_races_every_learner(ctrl, tmp_path):
    done = ctrl("exact", "--quick", "--out", tmp_path / "exact")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "exact" / "exact.json").read_text())["rows"]
    assert {(row["learner"], row["schedule"]) for row in rows} == {
        (learner, schedule) for learner in ("weighted", "adjoint", "backprop", "ppo") for schedule in ("vp", "flow")
    }
    assert {"gap_nats", "gap_stderr", "gap_floor_nats", "true_kl_nats", "energy_p_value", "seconds"} <= set(rows[0])
    for row in rows:
        assert row["gap_nats"] > row["true_kl_nats"] - 3 * row["gap_stderr"]
    page = (tmp_path / "exact" / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert {"density.png", "gap.png"} <= {path.name for path in (tmp_path / "exact").iterdir()}


@pytest.mark.filterwarnings("ignore:log Z")
def test_evaluate(ctrl_here, quick_run, tmp_path):
    done = ctrl_here("evaluate", quick_run, "-n", 80, "--out", tmp_path / "figures.json", "--quiet")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ctrl"]["samples"] == 80
    assert {len(column) for column in figures["certificate"]["pairs"].values()} == {40}
    # the prior's samples depend on the run's seed alone, not on n
    assert figures["target"] == json.loads((quick_run / "metrics.json").read_text())["target"]


TINY = {
    "classifier": {"updates": 200},
    "weighted": {"updates": 3, "batch": 16, "cache": 8, "renoising": 2},
    "adjoint": {"updates": 3, "batch": 8},
    "backprop": {"updates": 3, "batch": 8},
    "ppo": {"updates": 3, "batch": 8},
    "evaluation": {"prior_samples": 8, "paths": 80, "probes": 1, "sweep_paths": 80},
    "steps": 2,
    "rank": 4,
}


@pytest.mark.filterwarnings("ignore:log Z")
def test_one_seed_the_same_bytes(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        demo_job({**TINY, "learners": ["weighted", "backprop", "ppo", "adjoint"]}, folder)
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in folders]
    assert files[0] == files[1]
    for name in files[0]:
        a, b = ((folder / name).read_bytes() for folder in folders)
        if name.name == "metrics.json":
            a, b = ({k: v for k, v in json.loads(text).items() if k != "seconds"} for text in (a, b))
        if str(name) != "report.html":  # it quotes the seconds and the command
            assert a == b, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_a_kl_budget_lowers_gamma_and_a_run_can_be_made_again_from_it(tmp_path):
    first = demo_job(
        {**TINY, "kl_budget": 0.3, "evaluation": {**TINY["evaluation"], "prior_samples": 100}}, tmp_path / "a"
    )
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert 0 < config["gamma"] < 1
    assert "within 0.3 nats" in (tmp_path / "a" / "report.html").read_text()
    again = demo_job({key: value for key, value in config.items() if key != "data"}, tmp_path / "b")
    assert again["certificate"] == first["certificate"]


@pytest.mark.filterwarnings("ignore:log Z")
@pytest.mark.parametrize("value", [float("nan"), pytest.param(1e9, marks=pytest.mark.slow)])
def test_a_learner_that_diverges_is_rolled_back(tmp_path, monkeypatch, value):
    """After three good updates the parameters are not finite any more, or so large that the control is lost."""
    learner_of = stages.learner_of

    def poisoned(run, stage, phase):
        learner = learner_of(run, stage, phase)
        if stage == "weighted":
            return learner

        def steps(policy, *rest):
            for number, step in enumerate(learner(policy, *rest), start=1):
                if number == 4:
                    with torch.no_grad():
                        policy.trainable()[0].mul_(value)
                yield step

        return steps

    monkeypatch.setattr(stages, "learner_of", poisoned)
    settings = {
        **TINY,
        "adjoint": {"updates": 8, "batch": 8},
        "weighted": {**TINY["weighted"], "updates": 60, "batch": 64},
    }
    metrics = demo_job({**settings, "evaluation": {**TINY["evaluation"], "probes": 8}}, tmp_path / "run")
    assert math.isfinite(metrics["certificate"]["gap_nats"])
    stopped = [stage for stage in metrics["training"]["stages"] if "stopped" in stage]
    assert [stage["stage"] for stage in stopped] == ["adjoint"]
    assert "diverged" in stopped[0]["stopped"]
    assert "adjoint stopped at update" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_patience_ends_a_learner_that_brings_nothing(tmp_path):
    still = {"updates": 40, "batch": 8, "lr_embedding": 1e-12, "lr_adapter": 1e-12}
    settings = {**TINY, "adjoint": still, "patience": 2, "evaluation": {**TINY["evaluation"], "probes": 10}}
    metrics = demo_job(settings, tmp_path / "run")
    (stopped,) = [stage for stage in metrics["training"]["stages"] if stage["stage"] == "adjoint"]
    assert "no better control in 2 probes" in stopped["stopped"]
    assert stopped["update"] < 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_a_config_makes_the_run_again(tmp_path, ctrl):
    demo_job(TINY, tmp_path / "a")
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_the_demo_of_a_prior_that_knows_no_classes(tmp_path, ctrl_here):
    """y = digit on the null class: no condition, no ruler, a judge fitted on other digits."""
    settings = {"classifier": {"updates": 300, "grid": 4, "depth": 2}, "evaluation": {**TINY["evaluation"]}}
    settings["evaluation"]["prior_samples"] = 20
    metrics = demo_job({**TINY, **settings}, tmp_path / "a", controls="digit")
    assert metrics["accuracy_by"] == "judge"
    assert metrics["ctrl"]["judge_accuracy"] == metrics["ctrl"]["accuracy"]
    assert metrics["ctrl"]["class_accuracy"] is None
    assert len(metrics["certificate"]["pairs"]["gap_nats"]) == 10
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (config["unconditional"], config["classes"], config["controls"][0]["condition"]) == (True, None, None)
    tables = [(tmp_path / "a" / name / "metadata.csv").read_text().splitlines() for name in ("data", "judge_data")]
    assert [len(table) - 1 for table in tables] == [200, 1597]
    done = ctrl_here("sample", tmp_path / "a", "--set", "digit=7", "-n", 2, "--quiet", "--out", tmp_path / "sevens")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sevens" / "metadata.csv").read_text().splitlines()[1] == "00000.png,7"
    done = ctrl_here("sample", tmp_path / "a", "--class", 3, "--out", tmp_path / "no")
    assert (done.returncode, done.stderr) == (2, "ctrl: --class 3: this prior is unconditional. Leave --class out.\n")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A tiny run with two controls from two datasets."""
    folder = tmp_path_factory.mktemp("several") / "both"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        demo_job({**TINY, "learners": ["weighted", "adjoint"]}, folder, controls="ink,slant")
    return folder


def test_two_controls_from_two_datasets_that_share_no_image(both):
    read = [read_images(both / "data" / name, {name: None}, (1, 8, 8)) for name in ("ink", "slant")]
    assert [len(data) for data in read] == [250, 250]
    assert set(map(bytes, read[0].x.numpy())).isdisjoint(map(bytes, read[1].x.numpy()))
    assert (both / "data" / "slant" / "metadata.csv").read_text().splitlines()[0] == "file_name,slant", "no digit"
    metrics = json.loads((both / "metrics.json").read_text())
    found = metrics["controls"]
    assert {"all_accuracy", "all_target", "null_shift", "ink", "slant"} == set(found)
    assert (found["all_accuracy"], found["all_target"]) == (metrics["ctrl"]["accuracy"], metrics["target"]["accuracy"])
    for name, classes in (("ink", 4), ("slant", 2)):
        one = found[name]
        assert metrics["ctrl"]["accuracy"] <= one["accuracy"] <= 1
        assert 0 <= one["judge_accuracy"] <= 1
        assert {"accuracy", "target", "gap_nats"} <= set(one["alone"])
        for shares in one["nulled"]["shares"].values():
            assert len(shares) == classes
            assert sum(shares) == pytest.approx(1, abs=1e-4)
    names = {path.name for path in both.iterdir()}
    assert {"plane.png", "reliability.png", "reliability-slant.png"} <= names
    assert (both / "control" / "slant" / "control.safetensors").is_file()
    page = (both / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "One control, the other, both" in page


@pytest.mark.filterwarnings("ignore:log Z")
def test_a_control_added_later_leaves_the_run_as_it_was(ctrl_here, both, quick_run, tmp_path):
    """The model of one control before and after a second came: with that null, the same pictures to the byte."""
    settings = tmp_path / "tiny.yaml"
    settings.write_text(yaml.safe_dump(TINY | {"ruler": "slant"}))
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
    own = {"classifier": {"grid": 1, "depth": 1, "augment": "any_side_up", "updates": 1500}, "ruler": "ink"}
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:log Z")
def test_a_run_is_replaced_when_asked_and_nothing_else_goes(tmp_path):
    (tmp_path / "thesis.txt").write_text("not a run")
    for overwrite, message in (
        (False, "not empty. Choose another --out, or pass --overwrite"),
        (True, "no progress.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            demo_job(TINY, tmp_path, JobOptions(overwrite=overwrite))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    run = tmp_path / "run"
    demo_job(TINY, run)
    (run / "notes.txt").write_text("mine")
    before = (run / "control" / "control.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        demo_job(TINY, run)
    with pytest.raises(ValueError, match="gamma"):
        demo_job({**TINY, "gamma": -1.0}, run, JobOptions(overwrite=True))
    assert (run / "control" / "control.safetensors").read_bytes() == before, "a mistake costs nothing"
    demo_job({**TINY, "seed": 1}, run, JobOptions(overwrite=True))
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "control" / "control.safetensors").read_bytes() != before


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


def labels_changed(source, folder, change):
    """A copy of a dataset with the lines of its table changed."""
    shutil.copytree(source, folder)
    lines = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join([lines[0], *(change(i, line) for i, line in enumerate(lines[1:]))]))


@pytest.fixture(scope="module")
def places(quick_run, tmp_path_factory):
    """Folders with one thing wrong each."""
    root = tmp_path_factory.mktemp("places")
    made = {"run": quick_run, "data": quick_run / "data"}
    for name in ("typo", "unfinished", "damaged"):
        made[name] = root / name
        shutil.copytree(quick_run, made[name])
    config = yaml.safe_load((made["typo"] / "config.yaml").read_text())
    (made["typo"] / "config.yaml").write_text(yaml.safe_dump({**config, "gama": 2.0}))
    shutil.rmtree(made["unfinished"] / "control")
    weights = made["damaged"] / "control" / "control.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    made["file"] = root / "file"
    made["file"].write_text("")
    changes = {
        "one-class": lambda i, line: line[: line.rindex(",")] + ",1",
        "blank": lambda i, line: line[: line.rindex(",")] + "," if i == 4 else line,
        "rare": lambda i, line: line[: line.rindex(",")] + ",5" if i == 4 else line,
    }
    for name, change in changes.items():
        made[name] = root / name
        labels_changed(made["data"], made[name], change)
    made["empty"] = root / "empty"
    made["empty"].mkdir()
    (made["empty"] / "metadata.csv").write_text("file_name,ink\n")
    made["unreadable"] = root / "unreadable"
    shutil.copytree(made["data"], made["unreadable"])
    (made["unreadable"] / "00007.png").write_text("no picture")
    made["latent"] = root / "latent"
    made["latent"].mkdir()
    (made["latent"] / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}'
    )
    return made


# what is wrong with a copy of 500 digits: a line of its table for the line of row 5, or what is done to the folder, and
# what is said of it
BROKEN = {
    "missing file": ("lost.png,3,1", "row 5: cannot read 'lost.png'"),
    "truncated PNG": ("truncated.png,3,1", "row 5: cannot read 'truncated.png' (image file is truncated"),
    "blank label": ("00004.png,3,", "row 5: ink is blank. Label it or remove the row."),
    "file in two rows": ("00001.png,3,1", "row 5: '00001.png' is in row 2 too and might stand in two parts"),
    "path traversal": ("../../secret.png,3,1", "row 5: cannot read its image ('../../secret.png' lies outside the"),
    "too large": ("huge.png,3,1", "row 5: cannot read 'huge.png' (9000×9000 pixels are too many). Mend it or"),
    "lone class": ("00004.png,3,5", "ink = '5' has 1 example(s). Bring at least 10 of every class, or leave the"),
    "not UTF-8": (lambda t: t.write_bytes(t.read_bytes() + "x.png,3,zwölf".encode("latin-1")), "is not UTF-8: 'utf-8'"),
    "no such column": (
        lambda t: t.write_text(t.read_text().replace("ink", "stroke", 1)),
        "has no column ink; it has: file_name, digit, stroke.",
    ),
    "no table": (lambda t: t.unlink(), "has no metadata.csv or metadata.jsonl. Write one with file_name"),
}  # fmt: skip
SKIPPED = ("missing file", "truncated PNG", "blank label", "file in two rows", "path traversal", "too large")


@pytest.fixture(scope="module")
def ragged(quick_run, tmp_path_factory):
    """A dataset with bad files lying in it, none of them in its table yet."""
    folder = tmp_path_factory.mktemp("ragged") / "data"
    shutil.copytree(quick_run / "data", folder)
    (folder / "truncated.png").write_bytes((folder / "00004.png").read_bytes()[:-30])
    Image.new("1", (9000, 9000)).save(folder / "huge.png")
    Image.new("L", (1250, 800)).save(folder / "million.png")
    Image.new("L", (9, 8)).save(folder / "wide.png")
    return folder


def with_rows(source, folder, rows):
    """A copy of a dataset in which these lines take the places of those of row 5 and the following."""
    labels_changed(source, folder, lambda i, line: rows[i - 4] if 4 <= i < 4 + len(rows) else line)
    return folder


JOBS = {
    "train": ["train", "--prior", "digits", "--control", "ink", "--condition", "digit", "--data"],
    "classifier": ["classifier", "--control", "ink", "--condition", "digit"],
}


@pytest.mark.parametrize("command", JOBS)
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_dataset_is_one_line_that_names_the_row(ctrl_here, ragged, tmp_path, what, command):
    wrong, message = BROKEN[what]
    data = with_rows(ragged, tmp_path / "data", [wrong] if isinstance(wrong, str) else [])
    if callable(wrong):
        wrong(data / "metadata.csv")
    done = ctrl_here(*JOBS[command], data, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("ctrl: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:log Z")
@pytest.mark.parametrize("command", JOBS)
def test_bad_rows_are_skipped_and_odd_sizes_resized(ctrl_here, ragged, tmp_path, command):
    """Every kind of bad row at once, a million pixels and a wide image: two lines, and the job is done."""
    rows = [BROKEN[what][0] for what in SKIPPED]
    data = with_rows(ragged, tmp_path / "data", [*rows, "million.png,3,1", "wide.png,3,1"])
    settings = tmp_path / "tiny.yaml"
    settings.write_text(yaml.safe_dump(TINY))
    prior = ["--prior", "digits"] if command == "classifier" else []
    done = ctrl_here(
        *JOBS[command], data, *prior, "--skip-bad", "--config", settings, "--quiet", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "metadata.csv" in line]
    assert "6 of 500 rows cannot be used" in said[0]
    assert "4 × unreadable images, 1 × blank labels, 1 × repeated images" in said[0]
    assert "2 of 500 images are not 8×8 (row 11 is 1250×800): they were resized." in said[1]
    assert (tmp_path / "out" / "report.html").is_file()


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


def test_copies_under_other_names_are_told(ctrl_here, quick_run, tmp_path):
    """In one dataset, and between the data of p̂ and of its judge."""
    for name in ("data", "judge_data"):
        shutil.copytree(quick_run / name, tmp_path / name)
    shutil.copy(tmp_path / "data" / "00001.png", tmp_path / "data" / "00004.png")
    shutil.copy(tmp_path / "data" / "00002.png", tmp_path / "judge_data" / "00000.png")
    given = {"prior": "digits", "control": "ink", "data": str(tmp_path / "data"), "condition": "digit"}
    with (
        pytest.warns(UserWarning, match=r"1 of 500 images are copies of another \(the first: rows 2 and 5 of those"),
        pytest.warns(UserWarning, match="1 of its images are in judge_data too"),
    ):
        prepare.prepare(given | {"judge_data": str(tmp_path / "judge_data")})


TRAIN = "train --prior digits --control ink --out {tmp}/o --data "
CLASSIFIER = "classifier --control ink --out {tmp}/o "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sample {tmp}/missing --out {tmp}/o", "there is no folder"),
        ("sample {tmp} --out {tmp}/o", "is not a run folder"),
        ("sample {run} --set slant=1 --out {tmp}/o", "unknown control 'slant'; this run has: ink"),
        ("sample {run} --set ink=9 --out {tmp}/o", "ink must be one of 1, 2, 3, 4, got '9'"),
        ("sample {run} --set ink --out {tmp}/o", "ink must be one of 1, 2, 3, 4, got ''"),
        ("sample {run} --class 11 --out {tmp}/o", "--class must be one of the prior's 10 classes"),
        ("sample {run} --steps 5000 --out {tmp}/o", "fewer than 5000 distinct times"),
        ("sample {run} --out {run}", "is not empty. Choose another --out, or pass --overwrite"),
        ("sample {run} --out {run} --overwrite", "no sample.json of ours"),
        ("sample {run} -n 0 --out {tmp}/o", "Invalid value for '-n'"),
        ("evaluate {typo}", "gama: Extra inputs are not permitted"),
        ("evaluate {unfinished}", "unfinished run: it lacks control"),
        ("evaluate {damaged}", "is damaged"),
        ("demo --seed 4294967296 --out {tmp}/o", "Invalid value for '--seed'"),
        ("demo --learner magic --out {tmp}/o", "learners: no learner is called 'magic'. There are weighted"),
        ("demo --controls slant --out {tmp}/o", "the demo's controls are ink or digit or ink,slant; got 'slant'"),
        ("demo --quick --out {run}", "or pass --overwrite"),
        ("demo --quick --out {file}", "is a file"),
        ("exact --quick --out {run}", "or pass --overwrite"),
        ("exact --quick --out {run} --overwrite", "no exact.json of ours"),
        (CLASSIFIER + "{tmp}/missing", "there is no folder or file"),
        (CLASSIFIER + "{empty}", "has no rows. Write one line per image"),
        (CLASSIFIER + "{one-class}", "all 500 examples have ink = '1'. A control needs two classes"),
        (CLASSIFIER + "{rare}", "ink = '5' has 1 example(s). Bring at least 10 of every class"),
        (CLASSIFIER + "{blank}", "row 5: ink is blank. Label it or remove the row"),
        (CLASSIFIER + "{unreadable}", "row 8: cannot read '00007.png'"),
        ("classifier {data} --control slant --out {tmp}/o", "has no column slant; it has: file_name, digit, ink"),
        (CLASSIFIER + "{data} --condition ink", "both name the column 'ink'"),
        ("classifier {data} --control ink --out {run}", "is not empty. Choose another --out, or pass --overwrite"),
        (TRAIN + "{one-class}", "A control needs two classes"),
        (TRAIN + "{blank}", "is blank"),
        (TRAIN + "{data} --condition weight", "has no column weight"),
        (TRAIN + "{data} --classifier {data}", "holds no classifier"),
        (TRAIN + "{data} --steps 5000", "fewer than 5000 distinct times"),
        (TRAIN + "{data} --gamma -1", "gamma: Input should be greater than or equal to 0"),
        (TRAIN + "{data} --learner adjoint,magic", "learners: no learner is called 'magic'. There are weighted"),
        (TRAIN + "{data} --config {file}", "must hold KEY: VALUE lines"),
        (TRAIN + "{data} --config {tmp}/none.yaml", "No such file"),
        ("train --prior digits --control ink --out {tmp}/o", "--data is missing"),
        (
            "train --prior {latent} --data {data} --control ink --out {tmp}/o",
            "cannot be loaded: it lacks its unet and vae and text_encoder and tokenizer",
        ),
        ("train --prior {data} --data {data} --control ink --out {tmp}/o", "is no pipeline folder of diffusers"),
        ("train --prior digits --data {data} --control ink --out {run}", "or pass --overwrite"),
    ],
)
def test_bad_input_is_one_clear_line(ctrl_here, places, tmp_path, arguments, message):
    done = ctrl_here(*(argument.format(tmp=tmp_path, **places) for argument in arguments.split()))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 or "Usage" in done.stderr, done.stderr
    assert not (tmp_path / "o").exists(), "nothing half-written"
