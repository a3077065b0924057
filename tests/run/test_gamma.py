"""A run whose control is trained for several γ: its settings, its certificate along γ, its samples and its page."""

import json
import warnings

import pytest
import torch
from faults import SETTINGS

from ctrl_diffusion.commands.jobs.demo import demo_job
from ctrl_diffusion.run.config import Config
from ctrl_diffusion.run.run import Run

CONTROL = {"name": "ink", "data": "-"}


def config(**values):
    return Config.from_values({"prior": "digits", "controls": [CONTROL], **values})


def test_the_run_has_its_own_gamma_first():
    assert config(gammas=[4, 0.5, 1, 2, 2]).trained_gammas == (1.0, 0.5, 2.0, 4.0)
    assert config(gammas=[1, 2], gamma=3.0).trained_gammas == (3.0, 1.0, 2.0)
    assert config(gamma=2.0).trained_gammas == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gammas": [1]}, "another γ beside gamma: 1"),
        ({"gammas": []}, "gammas"),
        ({"gammas": [0, 1]}, "gammas"),
        ({"gammas": [1, 2], "gamma": 0}, "must not be 0"),
        ({"gammas": [1, 2], "kl_budget": 3}, "gammas excludes kl_budget"),
    ],
)
def test_what_is_no_list_of_gammas_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A smoke test's run with every γ of a list, and samples enough to certify most pairs at all of them."""
    folder = tmp_path_factory.mktemp("gamma") / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluation = {**SETTINGS["evaluation"], "prior_samples": 500}
        demo_job({**SETTINGS, "gammas": [0.5, 1, 2, 4], "evaluation": evaluation}, folder)
    return folder


def test_the_certificate_is_a_curve_along_gamma(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    rows = {row["gamma"]: row for row in metrics["gammas"]}
    assert list(rows) == [0.5, 1.0, 2.0, 4.0]
    assert rows[1.0]["gap_nats"] == metrics["certificate"]["gap_nats"]
    assert rows[1.0]["accuracy"] == metrics["ctrl"]["accuracy"]
    for row in rows.values():
        assert row["certified_pairs"] > 30
        assert row["gap_nats"] == pytest.approx(row["log_z_nats"] - row["objective_nats"], abs=1e-3)
        assert min(row["gap_stderr"], row["log_z_slope_stderr"], row["mean_log_p_stderr"]) > 0
    log_z, slope = ([row[key] for row in rows.values()] for key in ("log_z_nats", "log_z_slope"))
    assert log_z == sorted(log_z, reverse=True)
    assert slope == sorted(slope), "log Z is convex in γ"
    target = [row["target_accuracy"] for row in rows.values()]
    assert target[0] < target[-1]


def test_the_page_shows_it(finished):
    page = (finished / "report.html").read_text()
    assert (finished / "gammas.png").is_file()
    assert "γ is an input of the control" in page
    assert "any other γ from 0.5 to 4" in page


def test_samples_are_drawn_at_a_gamma(finished, tmp_path, ctrl_here):
    def drawn(run, name, *options):
        folder = tmp_path / name
        done = ctrl_here("sample", run, "--set", "ink=4", "-n", 2, "--quiet", "--out", folder, *options)
        assert done.returncode == 0, done.stderr
        pictures = [(folder / f"0000{i}.png").read_bytes() for i in range(2)]
        return pictures, json.loads((folder / "sample.json").read_text())

    plain, request = drawn(finished, "plain")
    assert "gamma" not in request
    assert drawn(finished, "one", "--gamma", 1)[0] == plain
    other, request = drawn(finished, "two", "--gamma", 3.5)
    assert request["gamma"] == 3.5
    assert drawn(finished, "again", "--gamma", 3.5)[0] == other
    done = ctrl_here("sample", finished, "--set", "ink=4", "--gamma", 8, "--out", tmp_path / "far")
    assert (done.returncode, done.stderr.count("\n")) != (0, 0)
    assert "the control 'ink' was trained for γ = 0.5 … 4, got 8." in " ".join(done.stderr.split())


def test_a_gamma_changes_what_is_sampled(finished):
    """By more than rounding, once the tables say something; a null label stays the prior's."""
    run = Run.load(finished)
    with torch.no_grad():
        for table in run.policy.controls["ink"].of_gamma:
            table.weight[:-1] += 1.0
    y, c = torch.tensor([3, 3]), torch.tensor([1, 2])

    def drawn(y, **options):
        return run.sample(y, c, generator=torch.Generator().manual_seed(0), **options)

    assert torch.equal(drawn(y), drawn(y, gamma=1.0))
    assert (drawn(y, gamma=4.0) - drawn(y)).abs().max() > 0.05
    null = torch.full((2,), -1)
    assert torch.equal(drawn(null, gamma=4.0), drawn(y, strength=0.0))
    with pytest.raises(ValueError, match=r"trained for γ = 0\.5 … 4, got 5"):
        drawn(null, gamma=5.0)
