"""What a page draws is what `ctrl sample` draws, and several visitors take turns."""

import io
import shlex
import time
import zipfile
from dataclasses import replace
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ctrl_diffusion.report.play.cards import downloads_html, drawing_html, pixels_of, png, status_html, zipped
from ctrl_diffusion.report.play.readings import Picture, certificate_sentence, tally
from ctrl_diffusion.report.play.request import Request
from ctrl_diffusion.report.play.session import Session
from ctrl_diffusion.report.play.sweep import STRENGTH, Sweep, draw_sweep, grid_of, sweep_html
from ctrl_diffusion.report.play.worker import Stopped, Visitors, Worker
from ctrl_diffusion.run.run import INK

ASKED = {"labels": {"ink": "3"}, "c": None, "n": 16, "strength": 1.0, "gamma": None, "steps": 20, "seed": 0}


def drawn(session, **asked):
    *_, drawing = session.draw(Request.checked(session.run, {**ASKED, **asked}), Event())
    assert drawing.finished
    return drawing


def pixels(pictures):
    return pixels_of(pictures)


def sampled(ctrl_here, request, session, folder):
    """The pictures that the command which a page shows writes."""
    words = shlex.split(request.command(session.run, session.folder))
    words[words.index("--out") + 1] = folder
    assert ctrl_here(*words[1:]).returncode == 0
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"labels": {"ink": ""}},
        {"c": "7", "strength": 1.5},
        {"strength": 0.0, "steps": 7},
        {"seed": 2**32 - 1, "n": 3},
    ],
)
def test_one_piece_is_what_ctrl_sample_writes_to_the_byte(open_session, ctrl_here, tmp_path, asked):
    session = open_session()
    drawing = drawn(session, **asked)
    assert (pixels(drawing.ctrl) == sampled(ctrl_here, drawing.request, session, tmp_path / "out")).all()


def test_several_pieces_differ_by_rounding_alone(open_session, ctrl_here, tmp_path):
    """Matrix products of another batch round differently: at most to the next byte."""
    session = open_session()
    drawing = drawn(session, n=40)
    written = sampled(ctrl_here, drawing.request, session, tmp_path / "out")
    assert np.abs(pixels(drawing.ctrl).astype(int) - written).max() <= 1


@pytest.mark.parametrize("made", ["both", "finished", "scaled", "other"])
def test_every_kind_of_run_is_drawn_as_ctrl_sample_does(open_session, ctrl_here, request, tmp_path, made):
    session = open_session(request.getfixturevalue(made))
    run = session.run
    labels = {name: control.values[-1] for name, control in run.policy.controls.items()}
    asked = {"labels": labels, "c": run.prior.class_names[run.classes[0]], "steps": run.config.steps, "n": 1}
    gamma = {"gamma": 2.0} if run.config.gammas else {}
    drawing = drawn(session, **asked, **gamma)
    assert (pixels(drawing.ctrl) == sampled(ctrl_here, drawing.request, session, tmp_path / "out")).all()
    (picture,) = drawing.ctrl
    assert [reading.control for reading in picture.readings] == run.names
    assert all(reading.says and reading.sees for reading in picture.readings)
    assert picture.c in drawing_html(session, drawing)
    assert "nats" in status_html(session, drawing) or "ertif" in status_html(session, drawing)


@pytest.mark.parametrize("asked", [{"labels": {"ink": ""}}, {"strength": 0.0}])
def test_nothing_asked_is_the_prior(open_session, asked):
    drawing = drawn(open_session(), **asked)
    assert (pixels(drawing.ctrl) == pixels(drawing.prior)).all()
    assert "nothing to certify" in certificate_sentence(open_session().run, {}, drawing.request)


def test_the_embedded_control_moves_pictures_toward_what_is_asked(open_session):
    """Of a prior that has each ink in a quarter, 64 samples have 32 with a probability below 10⁻⁵."""
    session = open_session()
    by_ink = [tally(drawn(session, labels={"ink": ink}, n=64).ctrl) for ink in "1234"]
    assert all(known == 64 for _, known in by_ink)
    assert all(hits >= 32 for hits, _ in by_ink)


def test_the_prior_is_drawn_once_for_all_labels(open_session, monkeypatch):
    session, calls = open_session(), []
    monkeypatch.setattr(session.run, "images", lambda x, images=session.run.images: calls.append(1) or images(x))
    first = drawn(session)
    assert len(calls) == 2
    second = drawn(session, labels={"ink": "1"})
    assert len(calls) == 3
    assert (pixels(first.prior) == pixels(second.prior)).all()
    assert [p.right for p in first.prior] != [p.right for p in second.prior]
    drawn(session, seed=1)
    assert len(calls) == 5


@pytest.mark.parametrize("made", ["both", "scaled", "other"])
def test_what_is_drawn_ahead_is_what_the_page_asks_first(open_session, request, monkeypatch, made):
    pytest.importorskip("gradio", reason="the page needs gradio")
    from ctrl_diffusion.report.play.page import page

    session = open_session(request.getfixturevalue(made))
    session.draw_ahead(Event())
    monkeypatch.delattr("ctrl_diffusion.report.play.session.rollout")  # nothing is left to sample
    events = page([session], Visitors()).fns.values()
    (load,) = (fn for fn in events if any(event == "load" for _, event in fn.targets))
    *_, (seed, _, pictures) = load.fn(SimpleNamespace(session_hash="a"), *(part.value for part in load.inputs))
    assert seed == 0
    assert "downloads" in pictures


def test_drawing_ahead_ends_with_the_page(open_session, worker):
    session, stop = open_session(), Event()
    stop.set()
    session.draw_ahead(stop)
    worker.close()
    session.draw_ahead(Event())
    assert not any(session.kept.values())


def test_few_pieces_are_kept(open_session):
    session = open_session()
    for seed in range(18):
        drawn(session, seed=seed, n=1, steps=1)
    assert {kind: len(pieces) for kind, pieces in session.kept.items()} == {"prior": 16, "ctrl": 4}


def test_marks_are_the_rulers(open_session):
    session = open_session()
    drawing = drawn(session)
    ruler = session.run.ruler_of(session.run.config.controls[0])
    for picture in (*drawing.prior, *drawing.ctrl):
        label = int(ruler(picture.image[None], None))
        assert picture.readings[0].sees == str(label + 1)
        assert picture.right == (label == 2)
        assert isinstance(picture.outside, bool)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "Certificate: at most"),
        ({"strength": 1.5}, "No certificate for strength 1.5"),
        ({"steps": 7, "strength": 2.0}, "No certificate for strength 2 and 7 steps"),
    ],
)
def test_the_certificate_is_claimed_only_where_it_holds(open_session, asked, words):
    session = open_session()
    request = Request.checked(session.run, {**ASKED, **asked})
    assert certificate_sentence(session.run, session.metrics, request).startswith(words)


def test_names_are_text_and_no_html(open_session):
    session = open_session()
    drawing = drawn(session, n=1)
    odd = drawing.ctrl[0]._replace(
        c="'><b>", readings=[drawing.ctrl[0].readings[0]._replace(says="<i>", sees="<script>")]
    )
    page = drawing_html(session, type(drawing)(drawing.request, (odd,), (odd,), 1.0))
    assert "<script>" not in page
    assert "'><b>" not in page


def test_the_zip_has_what_ctrl_sample_writes_and_the_command(open_session):
    session = open_session()
    drawing = drawn(session, n=3)
    command = drawing.request.command(session.run, session.folder)
    archive = zipfile.ZipFile(io.BytesIO(zipped(drawing.ctrl, [command], b"sheet")))
    assert archive.namelist() == ["00000.png", "00001.png", "00002.png", "grid.png", "command.txt"]
    assert archive.read("command.txt").decode() == command + "\n"
    for i, expected in enumerate(pixels(drawing.ctrl)):
        assert archive.read(f"{i:05d}.png") == png(expected)
    assert downloads_html(drawing.ctrl, [command]).count("href='data:") == 2


def test_a_grid_has_one_noise_and_the_prior_at_strength_0(open_session):
    session = open_session()
    sweep = grid_of(session, "ink", STRENGTH, {**ASKED, "labels": {}, "c": "7", "n": 1})
    *grown, whole = draw_sweep(session, sweep, Event())
    assert [len(each.cells) for each in grown] == list(range(25))
    rows = [whole.cells[i * 5 : i * 5 + 5] for i in range(5)]
    prior = pixels(rows[0][0])
    for row in rows:
        assert (pixels(row[0]) == prior).all()  # strength 0
    for cell in rows[0]:
        assert (pixels(cell) == prior).all()  # no label
    assert not (pixels(rows[4][2]) == prior).all()
    assert sweep_html(session, whole).count("<td>") == 25


def test_a_grid_is_sent_cell_by_cell_in_its_first_row_then_row_by_row():
    sweep = Sweep(["a", "b", "c"], ["1", "2"], ("y", "z"), [None] * 6)
    shown = [replace(sweep, cells=((),) * done).shown for done in range(7)]
    assert shown == [True, True, True, False, True, False, True]


def test_visitors_take_turns(worker):
    """One with three pieces of work, and one with a single piece who comes second."""
    order, begun = [], Event()

    def pieces(name, count):
        for _ in range(count):
            work = worker.do(lambda step: order.append(name) or begun.set() or time.sleep(0.05), Event())
            while True:
                try:
                    next(work)
                except StopIteration:
                    break

    first = Thread(target=pieces, args=("long", 3))
    first.start()
    begun.wait(10)
    pieces("short", 1)
    first.join()
    assert order == ["long", "short", "long", "long"]


@pytest.mark.parametrize("running", [True, False])
def test_a_stop_is_heard_at_the_next_step_or_before_the_first(worker, running):
    stop, free, steps = Event(), Event(), []
    if not running:
        Thread(target=list, args=[worker.do(lambda _: free.wait(10), Event())]).start()
        time.sleep(0.1)

    def work(step):
        for i in range(10**6):
            step()
            steps.append(i)
            if i == 3:
                stop.set()

    if not running:
        stop.set()
    with pytest.raises(Stopped):
        list(worker.do(work, stop))
    free.set()
    assert len(steps) == (4 if running else 0)


def test_work_that_nobody_looks_at_any_more_ends(worker):
    stop = Event()

    def work(step):
        while True:
            step()
            time.sleep(0.001)

    looked = worker.do(work, stop)
    next(looked)
    looked.close()
    assert stop.is_set()
    assert list(worker.do(lambda _: None, Event())) == []  # the thread is free again


def test_a_newer_drawing_takes_the_place_of_a_visitors_older_one():
    visitors = Visitors()
    first, other = visitors.begin("a", 1), visitors.begin("b", 1)
    second = visitors.begin("a", 2)
    assert (first.is_set(), second.is_set(), other.is_set()) == (True, False, False)
    assert visitors.is_last("a", second)
    assert not visitors.is_last("a", first)
    late = visitors.begin("a", 1)  # heard after the second, but sent before it
    assert (late.is_set(), second.is_set(), visitors.is_last("a", late)) == (True, False, False)
    visitors.stop("a")
    visitors.stop("nobody")
    assert (second.is_set(), other.is_set()) == (True, False)


def test_what_is_outdated_is_stopped_before_and_after_it_begins():
    visitors = Visitors()
    first, other = visitors.begin("a", 3), visitors.begin("b", 3)
    visitors.pass_over("a", 2)
    assert not first.is_set()
    visitors.pass_over("a", 3)
    assert (first.is_set(), other.is_set(), visitors.is_last("a", first)) == (True, False, False)
    visitors.pass_over("a", 4)  # heard before the drawing of that turn
    late, next_one = visitors.begin("a", 4), visitors.begin("a", 5)
    assert (late.is_set(), visitors.is_last("a", late), next_one.is_set()) == (True, False, False)


def test_a_page_waits_for_one_drawing_of_a_tab_at_a_time(open_session, other):
    """Of two that it waits for at once it may show the older one last."""
    pytest.importorskip("gradio", reason="the page needs gradio")
    from ctrl_diffusion.report.play.page import page

    events = page([open_session(), open_session(other)], Visitors()).fns.values()
    drawing = [fn for fn in events if len(fn.outputs) == 3]
    written = [part._id for fn in drawing for part in fn.outputs]
    assert len(written) == len(set(written)) == 3 * 5  # two runs, the comparison, two grids
    assert {fn.trigger_mode for fn in drawing} == {"always_last"}


def test_the_embedded_run_is_small_and_holds_no_pictures():
    files = [path for path in INK.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 1_500_000
    assert {path.suffix for path in files} <= {".json", ".yaml", ".safetensors"}
    config = (INK / "config.yaml").read_text()
    assert "/" not in config.replace("://", "")


def test_a_picture_without_a_known_reading_is_neither_right_nor_wrong():
    picture = Picture(None, [], None, "")
    assert picture.right is None
    assert tally([picture]) == (0, 0)


def test_a_run_without_metrics_says_so(open_session):
    session = open_session()
    bare = Session(session.run, session.folder, Worker())
    assert "No certificate: this run has no metrics.json" in status_html(bare, drawn(session, n=1))
