"""The comparison: every method on one run, what resumes, and what is refused."""

import json
import shutil
import warnings

import pytest
import torch
from tiny import TINY

from ctrl_diffusion.commands.jobs.compare import averaged, compare_job, in_words, interval
from ctrl_diffusion.commands.jobs.comparing import comparison as comparison_room
from ctrl_diffusion.commands.jobs.comparing.comparison import Comparison, judge_digests, read_again, subset
from ctrl_diffusion.commands.jobs.comparing.methods import METHODS, FittedModels, MethodSpec
from ctrl_diffusion.commands.jobs.demos.digits import labelled_digits
from ctrl_diffusion.commands.jobs.train import classifier_job, train_job
from ctrl_diffusion.data.labelled import write_imagefolder
from ctrl_diffusion.guide.selection import Importance
from ctrl_diffusion.reward.classifiers import Fitter
from ctrl_diffusion.reward.panel import Panel
from ctrl_diffusion.run.config import Config, ControlSettings
from ctrl_diffusion.run.run import Run
from ctrl_diffusion.system.files import rounded

KEY = ("method", "labels", "seed", "strength", "trial")
FIGURES = (
    "accuracy judge_accuracy macro_f1 class_accuracy frechet kernel precision recall coverage diversity_ratio "
    "network_evaluations classifier_evaluations gradient_evaluations classifier_gradients seconds"
).split()


@pytest.fixture(scope="module")
def run(quick_run, tmp_path_factory):
    """The quick demo on one digit and few steps, so that what it costs does not count."""
    folder = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(quick_run, folder)
    config = Config.read(folder / "config.yaml")
    controls = [control.with_(classifier={"updates": 300}).model_dump() for control in config.controls]
    config.with_(
        controls=controls, classes=[3, 8], steps=4, learners=["weighted"],
        weighted={"updates": 2, "renoising": 0, "cache": 20}, evaluation={"prior_samples": 40, "probes": 1},
    ).write(folder / "config.yaml")  # fmt: skip
    return folder


def asked(run, out, **more):
    return compare_job(run, out, **{"strengths": (1.0, 2.0), "n": 16, **more})


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    """Every method on the run as it is, and two of them on fewer labels of two seeds."""
    out = tmp_path_factory.mktemp("compared")
    return out / "whole", asked(run, out / "whole")


def test_every_method_has_its_trials_and_its_rows(compared):
    out, found = compared
    rows = found["rows"]
    assert {row["method"] for row in rows} == set(METHODS) == set(found["chosen"])
    for name, spec in METHODS.items():
        mine, best = [row for row in rows if row["method"] == name], found["chosen"][name]
        tried = {(str(row["settings"]), row["strength"]) for row in mine if row["trial"]}
        final = {(str(row["settings"]), row["strength"]) for row in mine if not row["trial"]}
        assert len(tried) + len(final) == len(mine), "no row twice"
        assert {(str(settings), w) for settings, w in map(spec.point, spec.grid((1.0, 2.0)))} <= tried
        assert len(tried) >= len(spec.grid((1.0, 2.0))) + len(spec.trials)
        chosen = (str(best["settings"]), best["strength"])
        assert final == tried if spec.front else {chosen} <= final <= {chosen, (chosen[0], 1.0)}
        for row in mine:
            assert all(row[key] is not None for key in FIGURES), name
            assert (row["gap_nats"] is not None) == spec.front, "a gap beside every strength"
        inside = sorted(spec.value(row["settings"], row["strength"]) for row in mine if row["trial"])
        value = spec.value(best["settings"], best["strength"])
        assert inside[0] < value < inside[-1] or value == spec.knob.off or best["on_edge"], name
        if spec.front:
            least = min((row for row in mine if row["trial"]), key=lambda row: row["gap_nats"])
            assert best["nearest"]["gap_nats"] == least["gap_nats"]
            assert inside[0] < least["strength"] < inside[-1] or best["on_edge"], name
    assert all((out / name).is_file() for name in ("compare.json", "pareto.png", "report.html"))
    assert not (out / "labels.png").exists(), "one number of labels is no line"


def test_a_sample_costs_what_the_method_says(compared):
    """N = 4 steps and the read-out: one evaluation each at w = 1, two for what extrapolates."""
    _, found = compared
    cost = {(row["method"], row["strength"]): row for row in found["rows"] if not row["trial"]}
    assert cost["ctrl", 1.0]["network_evaluations"] == found["about"]["prior_evaluations"] == 5
    assert cost["ctrl", 2.0]["network_evaluations"] == cost["free-guidance", 2.0]["network_evaluations"] == 9
    assert cost["ctrl", 1.0]["classifier_evaluations"] == cost["ctrl", 1.0]["gradient_evaluations"] == 0
    assert cost["dps", 1.0]["gradient_evaluations"] == 4
    assert cost["mpgd", 1.0]["gradient_evaluations"] == 0
    assert cost["mpgd", 1.0]["classifier_gradients"] == 4
    assert cost["importance", 1.0]["network_evaluations"] == 8 * 5


def test_a_comparison_that_was_cut_off_goes_on_and_ends_as_the_whole(run, compared, tmp_path):
    out, _ = compared
    cut = json.loads((out / "compare.json").read_text())
    kept = [row for row in cut["rows"] if row["method"] in ("ctrl", "mpgd", "tds")]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "compare.json").write_text(json.dumps({**cut, "rows": kept[:5], "cells": []}))
    found = asked(run, tmp_path / "cut", methods=["ctrl", "mpgd", "tds"], resume=True)

    def without_time(rows):
        return sorted(json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows)

    again = json.loads((tmp_path / "cut" / "compare.json").read_text())
    assert without_time(again["rows"]) == without_time(kept)
    assert found["chosen"].keys() == {"ctrl", "mpgd", "tds"}
    with pytest.raises(ValueError, match="compares another run, or with another -n"):
        asked(run, tmp_path / "cut", resume=True, n=24)


def test_cells_of_other_labels_and_seeds_are_fitted_once_and_kept(run, tmp_path):
    out, methods = tmp_path / "out", ["ctrl", "mpgd"]
    found = asked(run, out, methods=methods, labels=[60, 80], seeds=[1, 2], strengths=(1.0,))
    cells = {(row["method"], row["labels"], row["seed"]) for row in found["rows"] if not row["trial"]}
    assert cells == {(m, n, s) for m in methods for n in (60, 80) for s in (1, 2)}
    assert {(c["labels"], c["seed"]) for c in found["cells"]} == {(60, 1), (60, 2), (80, 1), (80, 2)}
    assert (out / "labels.png").is_file()
    one = Run.load(out / "cells" / "60-labels-seed-1")
    weights = one.panels["ink"].classifier.state_dict()
    other = Run.load(out / "cells" / "60-labels-seed-2").panels["ink"].classifier.state_dict()
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    # a row that is missing asks what was kept, and comes out the same
    cut = json.loads((out / "compare.json").read_text())
    missing = next(row for row in cut["rows"] if (row["method"], row["labels"], row["trial"]) == ("mpgd", 80, False))
    cut["rows"].remove(missing)
    cells = cut.pop("cells")  # as if it had been cut off before what is known of a cell was written
    (out / "compare.json").write_text(json.dumps({**cut, "cells": []}))
    before = (out / "cells" / "80-labels-seed-1").stat().st_mtime_ns
    again = asked(run, out, methods=methods, labels=[60, 80], seeds=[1, 2], strengths=(1.0,), resume=True)
    row = next(r for r in again["rows"] if all(r[k] == missing[k] for k in KEY))
    # six digits are written
    assert [row[name] for name in FIGURES[:-1]] == pytest.approx([missing[name] for name in FIGURES[:-1]], rel=1e-5)
    assert (out / "cells" / "80-labels-seed-1").stat().st_mtime_ns == before
    for cell, known in zip(again["cells"], cells, strict=True):
        assert all(cell[name] == pytest.approx(known[name], rel=1e-5) for name in known if name != "seconds")


def test_a_comparison_gone_on_with_fewer_methods_keeps_the_rows_of_the_others(run, tmp_path):
    found = asked(run, tmp_path / "out", methods=["ctrl", "mpgd"], strengths=(1.0,))
    again = asked(run, tmp_path / "out", methods=["ctrl"], strengths=(1.0,), resume=True)
    assert again["rows"] == rounded(found["rows"])
    assert again["chosen"].keys() == {"ctrl", "mpgd"}


def test_a_classifier_that_training_would_refuse_is_compared_and_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Panel, "informed", property(lambda self: False))
    with pytest.warns(UserWarning, match="60 labels, seed 1: p̂ of 'ink' is not clearly better than chance"):
        found = asked(run, tmp_path / "out", methods=["mpgd"], labels=[60], seeds=[1], strengths=(1.0,))
    assert [cell["uninformed"] for cell in found["cells"]] == [["ink"]]
    tried, compared = ({row["strength"] for row in found["rows"] if row["trial"] == kind} for kind in (True, False))
    assert tried == compared, "every strength that was tried"
    assert "would refuse it" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_subsets_are_even_over_classes_and_disjoint_from_the_rest(run):
    data = Comparison(Run.load(run), run / "compare", ["ctrl"], n=16).data["ink"]
    mine, rest = subset(data, "ink", 40, seed=0)
    assert (len(mine), len(rest)) == (40, len(data) - 40)
    counts = mine.labels["ink"].bincount() / 40 - data.labels["ink"].bincount() / len(data)
    assert counts.abs().max() < 1 / 40
    assert not set(mine.digests()) & set(rest.digests())


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run without ruler and judge_data: its judge has a part of the labels. A dozen images occur twice."""
    folder = tmp_path_factory.mktemp("judged")
    data = labelled_digits("ink", 0, 1200)[0][0]
    rows = torch.isin(data.labels["digit"], torch.tensor([3, 8])).nonzero().squeeze(1)
    write_imagefolder(folder / "data", data[torch.cat([rows, rows[:12]])])
    settings = {**TINY, "prior": "digits", "data": str(folder / "data"), "control": "ink", "condition": "digit"}
    settings |= {"kind": "classes", "evaluation": {**TINY["evaluation"], "prior_samples": 40}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies, and of so small a training
        train_job(settings, folder / "run")
    return folder / "run"


def recorded(monkeypatch, owner, name, images):
    """Let a method write down the images that it is given."""
    original, seen = getattr(owner, name), []

    def call(self, *given):
        seen.extend(digest for data in images(*given) for digest in data.digests())
        return original(self, *given)

    monkeypatch.setattr(owner, name, call)
    return seen


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_fitted_on_an_image_of_the_judge(judged, tmp_path, monkeypatch):
    """On the run's own models and on fewer labels: what p̂, the noise-aware p̂ and free guidance take, and held-out x."""
    judge = set(map(bytes, Run.load(judged).panels["ink"].judge_images.tolist()))
    in_prior_space = recorded(monkeypatch, FittedModels, "x_0", lambda data: [data])
    by_p_hat = recorded(monkeypatch, Fitter, "posterior", lambda images, *_: images)
    methods = ["ctrl", "classifier-guidance", "free-guidance"]
    found = asked(judged, tmp_path / "out", methods=methods, labels=[60], strengths=(1.0,))
    assert {row["labels"] for row in found["rows"] if not row["trial"]} == {60}
    assert min(len(in_prior_space), len(by_p_hat), len(judge)) > 60
    assert not judge & set(in_prior_space)
    assert not judge & set(by_p_hat)


@pytest.mark.filterwarnings("ignore")
def test_what_the_judge_saw_is_known_of_older_runs_and_of_judge_data(judged, run, tmp_path):
    """By the split that training made; images of judge_data count wherever they are found."""
    comparison, (settings,) = Comparison(Run.load(judged), tmp_path, ["ctrl"], n=16), Run.load(judged).config.controls
    whole = read_again(Run.load(judged), settings, settings.data)
    judge, pool = (set(data.digests()) for data in (comparison.judged["ink"], comparison.data["ink"]))
    assert judge | pool == set(whole.digests())
    assert not judge & pool
    assert len(comparison.data["ink"]) + len(comparison.judged["ink"]) == len(whole)
    assert all(set(part.digests()) <= pool for part in comparison.parts["ink"])
    old = Run.load(judged)
    old.panels["ink"].judge_images = None
    assert judge_digests(old, settings, whole) == judge
    there = Run.load(run)
    (settings,) = there.config.controls
    digits = read_again(there, settings, settings.data)
    others = read_again(there, settings.with_(condition=None), settings.judge_data)
    for known in (there.panels["ink"].judge_images, None):
        there.panels["ink"].judge_images = known
        assert judge_digests(there, settings, digits) == set(others.digests())
    there.panels["ink"].judge = None
    assert judge_digests(there, settings, digits) == set(), "a ruler needs no judge"


def test_a_judge_whose_images_nobody_knows_is_refused_unless_a_ruler_measures(judged):
    old = Run.load(judged)
    old.panels["ink"].judge_images = None
    settings = old.config.controls[0].with_(classifier_from="elsewhere")
    data = read_again(old, settings, settings.data)
    with pytest.raises(ValueError, match="elsewhere does not say which images the judge of 'ink' was .* anew"):
        judge_digests(old, settings, data)
    with pytest.warns(UserWarning, match="elsewhere does not say which images .* Go by the ruler"):
        assert judge_digests(old, settings.with_(ruler="ink"), data) == set()


def test_real_x_are_none_that_a_method_was_fitted_on(run, judged, tmp_path, monkeypatch):
    """Where enough were kept from them; else all, and one line says so."""
    comparison = Comparison(Run.load(run), tmp_path, ["ctrl"], n=16)
    observed = []
    original = comparison.observe
    comparison.observe = lambda data, condition: observed.append(data) or original(data, condition)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        real = comparison.real()
    fitted, *others = observed
    assert fitted is comparison.data["ink"]
    assert not set(fitted.digests()) & {digest for data in others for digest in data.digests()}
    assert real["n"] + real["n_compared"] == sum(map(len, others))
    assert real["n"] == real["n_samples"] == 16
    few = Comparison(Run.load(judged), tmp_path, ["ctrl"], n=16)
    monkeypatch.setattr(comparison_room, "FEWEST_REAL", 100)
    with pytest.warns(UserWarning, match="fewer than 100 real x of some label were kept from the methods"):
        counts = few.real()
    assert counts["n"] + counts["n_compared"] > len(few.judged["ink"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("known", [True, False])
def test_fewer_labels_are_fitted_as_the_classifier_that_was_brought(judged, tmp_path, known):
    """Of a `classifier_from` the config has the defaults: grid, depth, head and balance are those of its own fit."""
    config = Config.read(judged / "config.yaml")
    data = config.controls[0].data
    settings = {"grid": 2, "depth": 2, "head": "categorical", "balanced": True, "updates": 100, "augment": "none"}
    control = {"data": data, "condition": "digit", "kind": "classes"}
    classifier_job(ControlSettings(name="ink", **control, classifier=settings), tmp_path / "p", "digits")
    if not known:
        about = json.loads((tmp_path / "p" / "classifier.json").read_text())
        del about["settings"]
        (tmp_path / "p" / "classifier.json").write_text(json.dumps(about))
    training = {**TINY, **control, "prior": "digits", "control": "ink", "classifier_from": str(tmp_path / "p")}
    del training["classifier"]
    train_job({**training, "evaluation": {**TINY["evaluation"], "prior_samples": 40}}, tmp_path / "run")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        asked(tmp_path / "run", tmp_path / "out", methods=["ctrl"], labels=[60], strengths=(1.0,))
    p_hat = Run.load(tmp_path / "out" / "cells" / "60-labels-seed-0").panels["ink"]
    assert {key: p_hat.classifier.shape[key] for key in ("grid", "depth", "head", "balanced")} == {
        key: settings[key] for key in ("grid", "depth", "head", "balanced")
    }
    assert p_hat.settings["updates"] == (100 if known else 1500)
    said = [str(warning.message) for warning in told if "does not say how it was fitted" in str(warning.message)]
    assert len(said) == (0 if known else 1)


def test_the_grid_of_a_method_that_cannot_sample_ends_there_and_says_why(run, tmp_path, monkeypatch):
    """What failed is written down and not tried again by --resume; a method that never samples is left out whole."""

    class Fails(Importance):
        def sample(self, target, times, generator):
            if target.strength > self.most:
                raise ValueError(f"no more than {self.most}")
            return super().sample(target, times, generator)

    for name, most in (("some", 1.0), ("none", 0.0)):
        method = type("Fails", (Fails,), {"most": most})
        monkeypatch.setitem(METHODS, name, MethodSpec(name, lambda _, method=method: method(particles=2), front=False))
    methods = ["ctrl", "some", "none"]
    with pytest.warns(UserWarning, match="some at strength 2 is left out: no more than 1.0"):
        found = asked(run, tmp_path / "out", methods=methods, strengths=(1.0, 2.0))
    tried = {(row["method"], row["strength"]) for row in found["left_out"]}
    assert tried == {("some", 2.0), ("none", 1.0)}
    assert found["chosen"].keys() == {"ctrl", "some"}
    assert found["chosen"]["some"]["on_edge"] == [] or found["chosen"]["some"]["strength"] < 1.0
    assert "no more than 1.0" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is left out")
        again = asked(run, tmp_path / "out", methods=methods, strengths=(1.0, 2.0), resume=True)
    assert (len(again["rows"]), again["left_out"]) == (len(found["rows"]), found["left_out"])


def test_what_is_not_finite_ends_the_grid_and_is_no_row(run, tmp_path, monkeypatch):
    """Guidance may be turned up until its numbers overflow; neither rows nor JSON hold a NaN."""

    class Overflows(Importance):
        def sample(self, target, times, generator):
            return super().sample(target, times, generator) * (1.0 if target.strength < 2 else float("nan"))

    monkeypatch.setitem(METHODS, "loud", MethodSpec("loud", lambda _: Overflows(particles=2), front=False))
    with pytest.warns(UserWarning, match="loud at strength 2 is left out: its samples are not finite"):
        found = asked(run, tmp_path / "out", methods=["loud"])
    assert [(row["strength"], row["reason"]) for row in found["left_out"]] == [(2.0, "its samples are not finite.")]
    assert "NaN" not in (tmp_path / "out" / "compare.json").read_text()


def test_the_table_and_the_report_have_a_row_of_real_data_and_the_gap_of_every_strength(compared):
    out, found = compared
    said, page = in_words(found), (out / "report.html").read_text(encoding="utf-8")
    (row,) = (line for line in said.splitlines() if line.startswith("real data"))
    assert f"{found['real']['frechet']:.2f}" in row
    assert page.count('<td class="nowrap">real data</td>') == 2, "in the table of the chosen and in that of all"
    assert f"<td>{found['real']['frechet']:.2f}</td>" in page
    rows = averaged(found["rows"], found["chosen"])
    guided = [row for row in rows if METHODS[row["method"]].front]
    assert all("gap_nats" in row for row in guided)
    assert sum(row["nearest"] for row in rows) == 5 == sum(spec.front for spec in METHODS.values())
    assert said.count("*") == 6, "five gaps and the line that says what it means"


def test_intervals_are_students():
    assert interval([0.5], 0.1) == (0.5, pytest.approx(0.196))
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5))  # t of two degrees of freedom at 97.5 %


def test_rows_are_averaged_over_seeds_and_trials_left_out():
    base = {"method": "ctrl", "labels": 50, "strength": 1.0, "settings": {}, "accuracy_stderr": 0.1, "gap_nats": None}
    rows = [
        {**base, "seed": seed, "trial": trial, "accuracy": a}
        for seed, trial, a in ((0, True, 0.0), (1, False, 0.4), (2, False, 0.6))
    ]
    (found,) = averaged(rows, {"ctrl": {"settings": {}, "strength": 1.0}})
    assert found["accuracy"][0] == pytest.approx(0.5)
    assert (found["seeds"], found["chosen"], "gap_nats" in found) == (2, True, False)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--methods", "magic"], "--methods magic: unknown. There are: ctrl, classifier-guidance"),
        (["--labels", "50,many"], "--labels 50,many: give numbers with commas between them"),
        (["--labels", "5000"], "--labels 5000: ink has"),
        (["--labels", "20"], "example(s). Bring at least 10"),
        (["--quick"], "--quick is of ctrl compare exact"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run, ctrl_here, tmp_path, option, said):
    done = ctrl_here("compare", run, "--out", tmp_path / "out", *option)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists(), "nothing was begun"
