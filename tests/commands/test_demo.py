"""The demo's data, its runs and their reports."""

import csv
import json
import re

import pytest
import torch
import yaml
from tiny import TINY

from ctrl_diffusion.commands.jobs import demo
from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.data import digits as rulers
from ctrl_diffusion.data.read import read_images
from ctrl_diffusion.reward.fit import half_turn
from ctrl_diffusion.system.progress import JobOptions


def test_slant_is_the_slope_of_a_stroke():
    """A thin line a pixel to the right for each two up, its mirror image, its half turn, and an upright one."""
    line = torch.full((1, 1, 8, 8), -1.0)
    for row in range(8):
        line[0, 0, row, (7 - row) // 2 + 2] = 1.0
    # columns floor(h/2) of heights h = 0 … 7: the least-squares slope, from the sums
    heights = torch.arange(8.0)
    columns = (heights / 2).floor()
    h = heights - heights.mean()
    slope = float((h * columns).sum() / (h * h).sum())
    assert float(rulers.slant(line)) == pytest.approx(slope, abs=1e-6)
    assert float(rulers.slant(line.flip(-1))) == pytest.approx(-slope, abs=1e-6)
    assert float(rulers.slant(line.flip(-1, -2))) == pytest.approx(slope, abs=1e-6)
    upright = torch.full((1, 1, 8, 8), -1.0)
    upright[..., 3] = 1.0
    assert float(rulers.slant(upright)) == pytest.approx(0, abs=1e-6)
    assert float(rulers.slant(torch.full((1, 1, 8, 8), -1.0))) == 0.0, "an empty sheet does not lean"


def test_what_slants_goes_on_slanting_after_half_a_turn():
    x = labelled_digits("ink,slant", 0)[1][0].x
    torch.manual_seed(0)
    turned = half_turn(x)
    assert 0.3 < float((turned != x).flatten(1).any(1).float().mean()) < 0.7
    torch.testing.assert_close(rulers.slant(turned), rulers.slant(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_datasets_of_several_controls_share_no_image(seed):
    """Nor do the panels' share any with them; each is even over its classes."""
    (ink, of_ink), (slant, of_slant) = labelled_digits("ink,slant", seed)
    assert (len(ink), len(slant)) == (250, 250)
    assert list(slant.labels) == ["slant"], "y depends on x alone"
    kept = [{tuple(row) for row in data.x.flatten(1).tolist()} for data in (ink, slant, of_ink, of_slant)]
    assert not kept[0] & kept[1]
    assert not (kept[0] | kept[1]) & (kept[2] | kept[3])
    assert set(ink.labels["digit"].tolist()) == set(rulers.UPRIGHT)
    assert torch.equal(rulers.slant_ruler(slant.x), slant.labels["slant"])
    counts = slant.labels["slant"].bincount()
    assert counts.max() - counts.min() <= 2


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


@pytest.mark.parametrize(("words", "asked"), [((), ("ink", "digits")), (("--prior", "letters"), ("weight", "letters"))])
def test_the_last_line_says_how_to_turn_the_control_by_hand(quick_run, ctrl_here, monkeypatch, words, asked):
    called = []

    def job(values, out, options, controls, labels, prior):
        called.append((controls, prior))
        return json.loads((quick_run / "metrics.json").read_text())

    monkeypatch.setattr(demo, "demo_job", job)
    done = ctrl_here("demo", "--out", "runs/mine", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "turn it by hand, on a page in the browser: ctrl play runs/mine"
    assert called == [asked]
    assert ctrl_here("demo", "--out", "runs/mine", "--quiet").stdout == ""


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


def test_two_controls_from_two_datasets_that_share_no_image(both):
    read = [read_images(both / "data" / name, {name: None}, (1, 8, 8)) for name in ("ink", "slant")]
    assert [len(data) for data in read] == [250, 250]
    assert set(map(bytes, read[0].x.numpy())).isdisjoint(map(bytes, read[1].x.numpy()))
    assert (both / "data" / "slant" / "metadata.csv").read_text().splitlines()[0] == "file_name,slant", "no digit"
    metrics = json.loads((both / "metrics.json").read_text())
    found = metrics["controls"]
    shifts = {"null_shift", "null_shift_stderr", "null_shift_by_chance"}
    assert {"all_accuracy", "all_target", *shifts, "ink", "slant"} == set(found)
    assert all(0 <= found[name] < 1 for name in shifts)
    assert (found["all_accuracy"], found["all_target"]) == (metrics["ctrl"]["accuracy"], metrics["target"]["accuracy"])
    for name, classes in (("ink", 4), ("slant", 2)):
        one = found[name]
        assert metrics["ctrl"]["accuracy"] <= one["accuracy"] <= 1
        assert 0 <= one["judge_accuracy"] <= 1
        assert {"accuracy", "target", "gap_nats"} <= set(one["alone"])
        for shares in one["nulled"]["shares"].values():
            assert len(shares) == classes
        shares = one["nulled"]["shares"]
        assert sum(shares["prior"]) == pytest.approx(1, abs=1e-4)
        assert sum(shares["ctrl"]) == pytest.approx(1, abs=1e-4)
        assert (shares["target"] == [None] * classes) == (one["alone"]["target"] is None), "of eight samples"
    names = {path.name for path in both.iterdir()}
    assert {"plane.png", "reliability.png", "reliability-slant.png"} <= names
    assert (both / "control" / "slant" / "control.safetensors").is_file()
    page = (both / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "One control, the other, both" in page


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
