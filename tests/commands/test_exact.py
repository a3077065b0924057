"""The race of the learners, as a user starts it."""

import json

import pytest


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
