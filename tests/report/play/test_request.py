"""What a visitor may ask for; anything else is one clear line, also by hand."""

import math
import shlex

import pytest

from ctrl_diffusion.report.play.request import MOST_PICTURES, MOST_PROMPTS, Request, most_steps
from ctrl_diffusion.report.play.sweep import STRENGTH, grid_of

ASKED = {"labels": {"ink": "3"}, "c": "7", "n": 16, "strength": 1.0, "gamma": None, "steps": 20, "seed": 0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "how many must be a whole number in 1 … 64, got '0'"),
        ({"n": 10**6}, "how many must be a whole number"),
        ({"n": 2.5}, "got '2.5'"),
        ({"n": "16"}, "how many must be a whole number"),
        ({"n": True}, "how many must be a whole number"),
        ({"n": None}, "how many must be a whole number"),
        ({"n": [16] * 1000}, "how many must be a whole number"),
        ({"n": math.nan}, "got 'nan'"),
        ({"steps": 10**9}, "steps must be a whole number in 1 … 80"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"strength": math.inf}, "strength must be a number in 0 … 4"),
        ({"strength": -0.1}, "strength must be a number"),
        ({"seed": 2**32}, "seed must be a whole number"),
        ({"gamma": "much"}, "γ must be a number"),
        ({"labels": {"ink": "9"}}, "ink must be one of 1, 2, 3, 4, got '9'"),
        ({"labels": {"ink": ["3"]}}, "ink must be one value"),
        ({"labels": {"slant": "left"}}, "unknown control 'slant'; this run has: ink"),
        ({"c": "eleven"}, "must be one of the prior's 10 classes"),
        ({"c": "7" * 10**6}, "the condition must be a text of at most 500 letters"),
        ({"c": 7}, "the condition must be a text"),
    ],
)
def test_what_no_page_would_send_is_one_line(open_session, wrong, message):
    with pytest.raises(ValueError, match="got|this run has|must") as refusal:
        Request.checked(open_session().run, {**ASKED, **wrong})
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 200
    assert "\n" not in str(refusal.value)


def test_blanks_are_left_to_the_prior(open_session):
    run = open_session().run
    request = Request.checked(run, {**ASKED, "labels": {"ink": ""}, "c": ""})
    assert (dict(request.labels), request.c) == ({}, None)
    assert request.cond(run)["c"].tolist() == [*range(10), *range(6)]
    assert set(request.rows(run)["ink"].tolist()) == {-1}


@pytest.mark.parametrize("ask", ["", "3"])
@pytest.mark.parametrize("changed", [{}, {"c": ""}, {"strength": 0.5, "steps": 7, "seed": 9, "n": 3}])
def test_the_command_says_what_differs_from_the_default(open_session, ask, changed):
    run, asked = open_session().run, {**ASKED, "labels": {"ink": ask}, **changed}
    words = shlex.split(Request.checked(run, asked).command(run, "a run"))
    assert words[:3] == ["ctrl", "sample", "a run"]
    assert ("ink=3" in words) == bool(ask)
    assert ("--class" in words) == bool(asked["c"])
    assert ("--steps" in words) == (asked["steps"] != run.config.steps)
    assert words[words.index("-n") + 1] == str(asked["n"])


@pytest.mark.parametrize(("value", "place"), [("0.3", None), (None, -1)])
def test_a_scale_is_asked_for_by_its_numbers(open_session, scaled, value, place):
    run = open_session(scaled).run
    space = run.policy.controls["ink"].space
    request = Request.checked(run, {**ASKED, "labels": {"ink": float(value) if value else None}, "steps": 2})
    assert request.rows(run)["ink"][0] == (place if value is None else pytest.approx(space.label_of(value, "ink")))
    odd = Request.checked(run, {**ASKED, "labels": {"ink": 0.30000001}, "strength": 1.00000001, "steps": 2})
    assert odd.labels["ink"] == space.label_of(odd.texts["ink"], "ink")  # what the command will say, and no more
    assert odd.strength == 1
    with pytest.raises(ValueError, match=f"ink must be a number in {space.values[0]}"):
        Request.checked(run, {**ASKED, "labels": {"ink": 9.0}, "steps": 2})


def test_new_prompts_are_counted(open_session, finished):
    run = open_session(finished).run
    asked = {**ASKED, "labels": {"dark": "yes"}, "n": 1, "steps": most_steps(run)}
    for i in range(MOST_PROMPTS):
        Request.checked(run, {**asked, "c": f"a seven {i}"}).cond(run)
    assert Request.checked(run, {**asked, "c": "a seven 0"}).c == "a seven 0"
    with pytest.raises(ValueError, match="prompts were added to this page already"):
        Request.checked(run, {**asked, "c": "one more"})


def test_large_pictures_are_fewer(open_session, monkeypatch):
    run = open_session().run
    monkeypatch.setattr(run.prior.codec, "image_shape", (3, 1024, 1024), raising=False)
    with pytest.raises(ValueError, match="in 1 … 2, got '3'"):
        Request.checked(run, {**ASKED, "n": 3})
    assert MOST_PICTURES * math.prod((1, 8, 8)) < 2**23


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ("ink", "ink", "rows are a control, and columns another or the strength"),
        (STRENGTH, "ink", "rows are a control"),
        ("slant", STRENGTH, "unknown control 'slant'"),
        ("ink", "slant", "unknown control 'slant'"),
    ],
)
def test_a_grid_is_of_the_runs_controls(open_session, rows, columns, message):
    with pytest.raises(ValueError, match=message):
        grid_of(open_session(), rows, columns, {**ASKED, "labels": {}, "n": 2})


def test_a_grid_has_null_first_and_says_what_it_leaves_out(open_session, scaled):
    sweep = grid_of(open_session(), "ink", STRENGTH, {**ASKED, "labels": {}, "n": 2})
    assert sweep.rows == ["none", "1", "2", "3", "4"]
    assert (len(sweep.requests), sweep.left_out) == (5 * 5, 0)
    with pytest.raises(ValueError, match="how many must be a whole number in 1 … 4"):
        grid_of(open_session(), "ink", STRENGTH, {**ASKED, "labels": {}, "n": 5})
