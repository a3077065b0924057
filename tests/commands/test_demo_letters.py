"""The demos on letters: their labelled sets, their settings, and a run of each kind that takes seconds."""

import csv
import json
from itertools import combinations

import pytest
import torch
import yaml
from tiny import TINY

from ctrl_diffusion.commands.jobs.demo import DEMOS, demo_job, demo_values, first_controls
from ctrl_diffusion.commands.jobs.demos.letters import SETTINGS, labelled_letters
from ctrl_diffusion.data.labelled import LabelledImages, write_imagefolder
from ctrl_diffusion.data.letters.rulers import CHARACTERS
from ctrl_diffusion.data.letters.sets import letters
from ctrl_diffusion.data.read import read_images
from ctrl_diffusion.report.play.readings import read
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.prepare import prepare
from ctrl_diffusion.run.run import Run

ALL = "weight,slant,serif"
THREE = [CHARACTERS.index(letter) for letter in "Han"]
FEW = {"classes": THREE, "evaluation": {"prior_samples": 18, "paths": 8, "probes": 1, "sweep_paths": 8}}


def digests(data):
    return set(data.digests())


def test_the_first_demo_is_the_default_and_every_one_is_a_config():
    assert [first_controls(prior) for prior in DEMOS] == ["ink", "weight"]
    assert list(SETTINGS) == ["weight", "slant", "serif", ALL]
    for controls in SETTINGS:
        config = Config.from_values(demo_values(controls, {}, "letters"))
        assert config.prior == "letters"
        assert [control.ruler for control in config.controls] == [f"letter-{name}" for name in controls.split(",")]
        assert [control.kind == "scale" for control in config.controls] == [n != "serif" for n in config.names]
    with pytest.raises(ValueError, match="the demos on letters are weight or slant or serif or weight,slant,serif"):
        demo_values("ink", {}, "letters")
    with pytest.raises(ValueError, match="the demos are on digits or letters; got 'cats'"):
        demo_values("ink", {}, "cats")


@pytest.mark.parametrize("controls", SETTINGS)
def test_every_control_has_500_letters_and_its_judge_letters_of_other_families(controls):
    names, datasets = controls.split(","), labelled_letters(controls, 0)
    families = [set(letters(name).family.tolist()) for name in (*names, "real")]
    assert not any(a & b for a, b in combinations(families, 2))
    for name, (data, of_judge) in zip(names, datasets, strict=True):
        assert len(data) == 500
        assert list(data.labels) == ["letter", name]
        assert (of_judge is None) == (name == "serif"), "whose judge ships"
        if of_judge:
            assert len(of_judge) == len(letters("real").x)
            assert digests(data).isdisjoint(digests(of_judge)), "not even a picture is shared"
    drawn = labelled_letters(controls, 1, 200)[0][0]
    assert len(drawn) == 200
    assert digests(drawn) <= digests(datasets[0][0])
    with pytest.raises(ValueError, match=rf"--labels 501: {names[0]} has 500 labelled letters\. Ask for no more"):
        labelled_letters(controls, 0, 501)


@pytest.mark.parametrize("name", ["weight", "slant", "serif"])
def test_what_is_written_is_read_again(tmp_path, name):
    """Numbers as numbers, letters by their names in either case, and the pictures to the byte."""
    data, _ = labelled_letters(name, 0)[0]
    write_imagefolder(tmp_path, data)
    with (tmp_path / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file_name", "letter", name]
    x, c, y, _ = letters(name)
    numbers = {letter: i for i, letter in enumerate(CHARACTERS)}
    again = read_images(tmp_path, {"letter": numbers, name: None}, scales={name: name != "serif"})
    assert torch.equal(again.labels["letter"], c)
    torch.testing.assert_close(again.x, x)
    if name == "serif":
        assert again.values[name] == ("sans", "serif")
        assert torch.equal(again.labels[name], y)
    else:
        space = again.space(name)
        torch.testing.assert_close(again.labels[name], space.places(y), rtol=1e-4, atol=1e-4)
        ends = torch.quantile(y, torch.tensor([0.05, 0.95])).tolist()
        assert space.ends == pytest.approx(ends, rel=1e-3), "the central nine tenths"


@pytest.fixture(scope="module")
def leaning(once):
    """A tiny run whose control of slant is on a scale, on three letters, made by the command line's job."""
    control = {"name": "slant", "kind": "scale", "ruler": "letter-slant"}
    classifier = {"classifier": {"updates": 400, "grid": 4, "depth": 1}}
    settings = {**TINY, **FEW, **classifier, "controls": [control]}
    return once("letter-slant", lambda folder: demo_job(settings, folder, controls="slant", prior="letters"))


@pytest.mark.filterwarnings("ignore:log Z", "ignore:samples leave")
def test_a_run_on_letters_goes_from_training_to_its_report(leaning, ctrl_here):
    metrics = json.loads((leaning / "metrics.json").read_text())
    assert metrics["accuracy_by"] == "ruler"
    assert 0 <= metrics["ctrl"]["accuracy"] <= 1
    assert metrics["ctrl"]["judge_accuracy"] is not None
    assert metrics["scale"]["slant"]["samples"] <= 4
    config = yaml.safe_load((leaning / "config.yaml").read_text())
    assert (config["prior"], config["classes"], config["controls"][0]["ruler"]) == ("letters", THREE, "letter-slant")
    tables = [(leaning / name / "metadata.csv").read_text().splitlines()[0] for name in ("data", "judge_data")]
    assert tables == ["file_name,letter,slant"] * 2
    assert "measured by the ruler" in (leaning / "report.html").read_text()
    done = ctrl_here("evaluate", leaning, "-n", 8, "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy_by"] == "ruler"


def test_a_runs_ruler_is_told_which_letter_it_measures(leaning):
    run, (x, c, y, _) = Run.load(leaning), letters("slant")
    (settings,) = run.config.controls
    space = run.policy.controls["slant"].space
    places = run.measure_scale(settings, x[:40], c[:40])
    torch.testing.assert_close(places, space.places(y[:40]), rtol=1e-3, atol=1e-3)
    assert torch.equal(run.ruler_of(settings)(x[:40], c[:40]), space.nearest(places))
    other = run.measure_scale(settings, x[:40], c[:40].roll(1))
    assert (other - places).abs().mean() > 0.5, "of another letter it expects another slope"


def test_an_empty_picture_has_no_slant_and_is_not_right(leaning):
    run, (x, c, y, _) = Run.load(leaning), letters("slant")
    (settings,) = run.config.controls
    empty, c = torch.cat([torch.full_like(x[:1], -1.0), x[:1]]), c[[0, 0]]
    seen = run.ruler_of(settings)(empty, c)
    assert seen[0] == -1
    asked = {"slant": seen[1].repeat(2).float()}
    blank, letter = read(run, empty, empty, {"c": c}, asked)
    assert (blank.readings[0].sees, blank.readings[0].by, blank.right) == ("–", "ruler", False)
    assert (letter.readings[0].by, letter.right) == ("ruler", True)
    ends = run.policy.controls["slant"].space.ends
    assert float(letter.readings[0].sees) == pytest.approx(float(y[0].clamp(*ends)), abs=0.1)
    nothing_asked = read(run, empty, empty, {"c": c}, {})
    assert [picture.right for picture in nothing_asked] == [None, None]


def test_a_judge_that_ships_is_called_a_judge(leaning):
    run = Run.load(leaning)
    assert run.accuracy_by == "ruler"
    (control,) = run.config.controls
    for ruler in ("letter-serif", None):
        run.config = run.config.with_(controls=[{**control.model_dump(), "ruler": ruler}])
        assert run.accuracy_by == "judge"


@pytest.fixture(scope="module")
def serifed(once):
    """A tiny run whose control is of classes, which the judge that ships tells apart."""
    classifier = {"classifier": {"head": "categorical", "updates": 150, "grid": 4, "depth": 4}}
    settings = {**TINY, **FEW, **classifier, "controls": [{"name": "serif", "ruler": "letter-serif"}]}
    return once("letter-serif", lambda folder: demo_job(settings, folder, controls="serif", prior="letters"))


@pytest.mark.slow
def test_serif_is_measured_by_the_judge_that_ships(serifed):
    metrics = json.loads((serifed / "metrics.json").read_text())
    assert metrics["accuracy_by"] == "judge"
    assert metrics["classifier"]["judge_accuracy"] is None, "no label is spent on another"
    assert not (serifed / "judge_data").exists()
    assert "according to a judge that shares no label with the reward" in (serifed / "report.html").read_text()
    run, (x, c, y, _) = Run.load(serifed), letters("serif")
    assert run.accuracy_by == "judge"
    seen = run.ruler_of(run.config.controls[0])(x[:100], c[:100])
    assert (seen == y[:100]).float().mean() > 0.75
    picture, *_ = read(run, x[:2], x[:2], {"c": c[:2]}, {"serif": y[:2]})
    assert (picture.readings[0].by, picture.readings[0].sees) == ("judge", ("sans", "serif")[seen[0]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"unconditional": True},
            "needs to know which of 0 … z is shown, and this prior is given no c. Leave the",
        ),
        ({"prior": "digits"}, "measures 32 × 32 pixels, and this prior makes 8 × 8. Leave the ruler out"),
        ({"kind": "classes", "prior": "digits"}, "measures a number, not the classes of 'slant'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*not 8×8")
def test_a_ruler_that_cannot_measure_the_samples_is_refused_before_anything_is_fitted(tmp_path, settings, message):
    x, y = torch.zeros(60, 1, 32, 32), torch.arange(60) % 30
    x += torch.arange(60.0).view(-1, 1, 1, 1) / 100
    write_imagefolder(tmp_path, LabelledImages(x, {"slant": y}, {"slant": tuple(map(str, range(30)))}))
    given = {"prior": "letters", "control": "slant", "data": str(tmp_path), "kind": "scale", "ruler": "letter-slant"}
    with pytest.raises(ValueError, match=f"ruler: letter-slant {message}"):
        prepare({**given, **settings})
