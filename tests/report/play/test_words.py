"""Words: what a visitor may type, that a letter stays while others are added, and the page in a real browser."""

import io
import json
import re
import shlex
import zipfile
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from ctrl_diffusion.data.letters.rulers import CHARACTERS
from ctrl_diffusion.report.play.cards import drawing_html, pixels_of, word_of
from ctrl_diffusion.report.play.compare import both_html, draw_both
from ctrl_diffusion.report.play.request import Request
from ctrl_diffusion.report.play.sweep import draw_sweep, grid_of, sweep_html
from ctrl_diffusion.report.word import MOST_CHARACTERS, alphabet, letters_of, sheet_pixels
from tests.report.play.test_page import expected, served, until_shown, visit  # noqa: F401 — a fixture

LONGEST = "Hamburgefons"
ASKED = {"c": None, "n": 16, "strength": 1.0, "gamma": None, "steps": 2, "seed": 0}


def asked(session, word, **changed):
    """A request of a word with the last label of each control, as the page asks first."""
    labels = {name: control.space.values[-1] for name, control in session.run.policy.controls.items()}
    return Request.checked(session.run, {**ASKED, "labels": labels, "word": word, **changed})


def drawn(session, word, **changed):
    *_, drawing = session.draw(asked(session, word, **changed), Event())
    assert drawing.finished
    return drawing


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("Hé!é", "this run has no class for 'é', '!'. Choose other characters."),
        ("a\tb", r"this run has no class for '\t'"),
        ("<b>", "this run has no class for '<', '>'"),
        (LONGEST + "t", "the word must be a text of at most 12 characters, got 'Hamburgefonst'"),
        ("a" * 10**6, "the word must be a text of at most 12 characters"),
        (["a"], "the word must be a text"),
        (7, "the word must be a text"),
    ],
)
def test_a_word_is_bounded_in_one_line(open_session, lettered, word, message):
    with pytest.raises(ValueError, match="word|no class") as refusal:
        asked(open_session(lettered), word)
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 200
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("word", ["", "  ", None])
def test_a_blank_word_is_the_choice_of_classes(open_session, lettered, word):
    session = open_session(lettered)
    assert asked(session, word, c="g") == asked(session, "", c="g")
    assert asked(session, word, c="g").n == 16
    assert asked(session, word).cond(session.run)["c"].tolist() == list(range(16))


def test_a_word_stands_for_the_class_and_the_number(open_session, lettered):
    session = open_session(lettered)
    request = asked(session, " Hi 5 ", c="g", n=64)
    assert (request.word, request.c, request.n) == ("Hi 5", None, 3)
    assert request.cond(session.run)["c"].tolist() == [CHARACTERS.index(letter) for letter in "Hi5"]
    words = shlex.split(request.command(session.run, "a run"))
    assert words[words.index("--word") + 1] == "Hi 5"
    assert not {"-n", "--class"} & set(words)


def test_only_classes_named_by_characters_spell_words(open_session, lettered, finished):
    run = open_session(lettered).run
    assert list(alphabet(run)) == list(CHARACTERS)
    assert letters_of(run, "a b").tolist() == [36, 37]
    digits = open_session()
    assert alphabet(digits.run) == {}  # its classes have numbers alone
    with pytest.raises(ValueError, match="classes are not single characters: leave the word out"):
        Request.checked(digits.run, {**ASKED, "labels": {}, "word": "7"})
    assert alphabet(open_session(finished).run) == {}


def test_a_letter_keeps_its_picture_when_others_follow(open_session, lettered):
    """Products of another batch round differently: at most to the next byte."""
    session = open_session(lettered)
    short, long = drawn(session, "Ha"), drawn(session, LONGEST)
    for side in ("prior", "ctrl"):
        a, b = (pixels_of(getattr(drawing, side)).astype(int) for drawing in (short, long))
        assert np.abs(a - b[:2]).max() <= 1
        assert np.abs(a[0] - a[1]).max() > 100
    one, two = pixels_of(drawn(session, "aa").prior).astype(int)
    assert np.abs(one - two).max() > 100  # equal letters have noise of their own


def test_noise_stays_while_labels_change(open_session, lettered):
    session = open_session(lettered)
    strong, weak = drawn(session, "Hi"), drawn(session, "Hi", labels={"weight": "0.1"})
    assert (pixels_of(strong.prior) == pixels_of(weak.prior)).all()
    assert not (pixels_of(strong.ctrl) == pixels_of(weak.ctrl)).all()


@pytest.mark.parametrize("word", ["Hi 5", LONGEST])
def test_a_word_is_what_ctrl_sample_writes_to_the_byte(open_session, ctrl_here, lettered, tmp_path, word):
    session = open_session(lettered)
    drawing = drawn(session, word, seed=3)
    words = shlex.split(drawing.request.command(session.run, session.folder))
    words[words.index("--out") + 1] = tmp_path / "out"
    done = ctrl_here(*words[1:])
    assert (done.returncode, done.stdout) == (0, f"{drawing.request.n} samples in {tmp_path / 'out'}\n")
    files = sorted((tmp_path / "out").glob("0*.png"))
    assert (pixels_of(drawing.ctrl) == np.stack([np.asarray(Image.open(path)) for path in files])).all()
    whole = np.asarray(Image.open(tmp_path / "out" / "word.png"))
    assert (whole == sheet_pixels(word_of(drawing.ctrl, word))).all()
    assert json.loads((tmp_path / "out" / "sample.json").read_text())["word"] == word


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--word", "é"], "--word: this run has no class for 'é'"),
        (
            ["--word", "Hi", "--class", "g"],
            "--word Hi: each letter is a class with noise of its own. Leave --class out.",
        ),
        (["--word", "Hi", "--set", "weight=0.1", "--exact"], "Leave --exact out."),
    ],
)
def test_words_that_cannot_be_sampled_are_one_line(ctrl_here, lettered, tmp_path, options, message):
    done = ctrl_here("sample", lettered, *options, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_word_is_set_above_its_letters_with_their_readings(open_session, lettered):
    session = open_session(lettered)
    page = drawing_html(session, drawn(session, "a bc"))
    assert page.count("alt='the word a bc'") == 2
    assert page.count("class='picture small'") == 6
    assert page.count("<figcaption>") == 6
    assert "Download PNG" in page
    assert page.index("the word") < page.index("<figcaption>")


def test_a_grid_of_words_is_bounded(open_session, lettered):
    session = open_session(lettered)
    values = {**ASKED, "n": 2, "labels": {}, "word": "ab"}
    sweep = grid_of(session, "weight", "slant", values)
    assert (len(sweep.rows), len(sweep.columns), sweep.left_out) == (6, 6, 8)
    levels = session.run.policy.controls["weight"].values
    assert list(sweep.rows) == ["none", levels[0], levels[2], levels[4], levels[6], levels[8]]
    assert {request.word for request in sweep.requests} == {"ab"}
    assert len(grid_of(session, "weight", "slant", {**values, "word": ""}).rows) == 10
    with pytest.raises(ValueError, match="no class for"):
        grid_of(session, "weight", "slant", {**values, "word": "ä"})
    *_, whole = draw_sweep(session, sweep, Event())
    assert sweep_html(session, whole).count("alt='the word ab'") == 36
    drawing = drawn(session, "ab", labels={"weight": levels[8], "slant": ""})
    assert (pixels_of(whole.cells[-6]) == pixels_of(drawing.ctrl)).all()  # the last row, its first column


def test_two_runs_are_compared_by_a_word(open_session, lettered):
    pair, values = (open_session(lettered), open_session(lettered)), {**ASKED, "labels": {}, "word": "ab"}
    *_, drawings = draw_both(pair, (values, {**values, "labels": {"weight": "0.1"}}), Event())
    page = both_html(pair, drawings)
    assert page.count("alt='the word ab'") == page.count("class='downloads'") == 2


def test_the_example_of_a_grid_of_words_runs(lettered, tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "play.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("runs/letters", str(lettered)), {})
    assert Image.open("words.png").size[1] == 3 * 96


@pytest.fixture(scope="module")
def lettered_page(chromium, lettered):
    """The page of a run of letters."""
    with served([lettered]) as page:
        yield page


def typed(page, word):
    """Type into the box for a word by keys alone, from the top of the page."""
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.maxLength") == MOST_CHARACTERS:
            break
    page.keyboard.type(word)


def until_word(page, session, word, **changed):
    """Wait until the page shows a word's letters as a session draws them."""
    page.locator(f".ctrl img[alt='the word {word}']").wait_for()
    until_shown(page, session, labels=asked(session, "").texts, steps=2, word=word, **changed)


def test_a_word_is_typed_letter_by_letter_with_the_keyboard(lettered_page, visit):  # noqa: F811
    address, (session,) = lettered_page
    page = visit(address)
    typed(page, "Hi")
    until_word(page, session, "Hi")
    page.keyboard.type(" 5")
    until_word(page, session, "Hi 5")
    prior, ctrl = (page.locator(f".{side} img.word").bounding_box() for side in ("prior", "ctrl"))
    assert prior["y"] + prior["height"] < ctrl["y"]
    assert prior["x"] == ctrl["x"]
    assert prior["height"] == pytest.approx(ctrl["height"], rel=0.02)  # in one scale
    assert page.locator(".ctrl figcaption").count() == 3
    page.keyboard.type("!")
    page.get_by_text("this run has no class for '!'").wait_for()
    assert page.locator(".ctrl img.word").count() == 1  # what was drawn before stays
    for _ in "Hi 5!":
        page.keyboard.press("Backspace")
    until_shown(page, session, labels=asked(session, "").texts, steps=2)
    assert page.locator("img.word").count() == 0


def test_noise_stays_while_a_slider_moves(lettered_page, visit):  # noqa: F811
    address, (session,) = lettered_page
    page = visit(address)
    page.get_by_label("word").fill("Ra")
    until_word(page, session, "Ra")
    before = page.locator(".prior img.word").get_attribute("src")
    page.get_by_label("number input for weight").fill("0.1")
    page.get_by_label("number input for weight").press("Tab")
    labels = {**asked(session, "").texts, "weight": "0.1"}
    page.get_by_text("With the control: weight 0.1,").wait_for()
    until_shown(page, session, labels=labels, steps=2, word="Ra")
    assert page.locator(".prior img.word").get_attribute("src") == before


@pytest.mark.parametrize("width", [390, 1280])
def test_a_long_word_and_a_grid_do_not_stick_out(lettered_page, visit, width):  # noqa: F811
    address, (session,) = lettered_page
    page = visit(address)
    page.set_viewport_size({"width": width, "height": 844})
    page.get_by_label("word").fill(LONGEST)
    until_word(page, session, LONGEST)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [page.locator(f".{side} img.word").bounding_box() for side in ("prior", "ctrl")]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    page.get_by_role("tab", name="sweep").click()
    page.get_by_label("word").locator("visible=true").fill(LONGEST)
    page.get_by_role("button", name="Draw").locator("visible=true").click()
    page.get_by_text("36 of 36 cells").wait_for()
    assert page.locator(".sweep:visible td img.word").count() == 36
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_word_is_downloaded(lettered_page, visit):  # noqa: F811
    address, (session,) = lettered_page
    page = visit(address)
    page.get_by_label("word").fill("Go")
    until_word(page, session, "Go")
    _, ctrl = expected(session, labels=asked(session, "").texts, steps=2, word="Go")
    with page.expect_download() as event:
        page.get_by_role("link", name="Download zip").click()
    archive = zipfile.ZipFile(event.value.path())
    assert archive.namelist() == ["00000.png", "00001.png", "word.png", "command.txt"]
    got = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(f"0000{i}.png")))) for i in range(2)])
    assert (got == ctrl).all()
    assert "--word Go" in archive.read("command.txt").decode()
    with page.expect_download() as event:
        page.get_by_role("link", name="Download PNG").click()
    assert event.value.path().read_bytes() == archive.read("word.png")
