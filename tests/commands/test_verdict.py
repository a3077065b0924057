"""What a training says of a control that has not learned, and how it ends."""

import json
import re

import pytest
import yaml
from tiny import TINY

from ctrl_diffusion.run import prepare

STILL = {"lr_embedding": 1e-12, "lr_adapter": 1e-12}


@pytest.fixture
def train(quick_run, tmp_path, ctrl_here):
    """Train on the demo's data with the classifier of the quick run."""

    def call(settings, *options):
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
        given = ["--prior", "digits", "--data", quick_run / "data", "--control", "ink", "--condition", "digit"]
        given += ["--classifier", quick_run / "classifier", "--config", tmp_path / "settings.yaml", "--quiet"]
        done = ctrl_here("train", *given, "--out", tmp_path / "run", *options)
        return done, json.loads((tmp_path / "run" / "metrics.json").read_text()), tmp_path / "run"

    return call


@pytest.mark.filterwarnings("ignore:log Z")
@pytest.mark.parametrize("cut", [True, False])
def test_a_control_that_is_the_prior_is_not_learned(train, monkeypatch, cut):
    """The same updates end with 3 where they are the default, and with 0 where the user has cut them."""
    few = {name: {"updates": TINY[name]["updates"]} for name in ("weighted", "adjoint", "backprop", "ppo")}
    if not cut:
        monkeypatch.setattr(prepare, "suggested", lambda *_, **__: few)
    done, metrics, run = train({**TINY, "ruler": "ink", "weighted": {**TINY["weighted"], **STILL}})
    assert done.returncode == (0 if cut else 3), done.stderr
    assert metrics["learned"] is False
    assert abs(metrics["verdict"]["gained_nats"]) < 1e-3
    assert metrics["verdict"]["cut"] is cut
    (line,) = [line for line in done.stderr.splitlines() if "not learned" in line]
    assert line.startswith("ctrl: not learned: J gained")
    assert ("cut short" in line) is cut
    page = (run / "report.html").read_text()
    assert "<h1>Not learned: “ink”</h1>" in page
    assert re.search(r'class="verdict">Not learned: J gained', page)
    assert "A pre-trained model, now with" not in page


def test_a_control_that_has_learned_says_nothing_of_it(quick_run):
    metrics = json.loads((quick_run / "metrics.json").read_text())
    assert metrics["learned"] is True
    assert metrics["verdict"]["gained_nats"] > 3 * metrics["verdict"]["gained_stderr"] > 0
    assert metrics["verdict"]["causes"] == []
    assert metrics["verdict"]["cut"] is True, "--quick"
    page = (quick_run / "report.html").read_text()
    assert "<h1>A pre-trained model, now with “ink”</h1>" in page
    assert "Not learned" not in page
