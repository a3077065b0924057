"""The page in a real browser: what it shows is what was sampled, and nothing leaves the machine."""

import base64
import io
import json
import re
import socket
import zipfile
from contextlib import contextmanager
from threading import Event

import numpy as np
import pytest
from PIL import Image

from ctrl_diffusion.report.play.cards import pixels_of
from ctrl_diffusion.report.play.request import Request
from ctrl_diffusion.report.play.server import launch, load_sessions
from ctrl_diffusion.report.play.worker import Worker
from ctrl_diffusion.run.run import INK
from tests.report.play.conftest import HOW, free_port

SECONDS = 60_000  # milliseconds, for a machine with much else to do
ASKED = {"labels": {"ink": "4"}, "c": None, "n": 16, "strength": 1.0, "gamma": None, "steps": 20, "seed": 0}


@contextmanager
def served(runs):
    """Serve runs; the address and the sessions. Whatever this process looks up meanwhile is this machine."""
    hosts, look_up = set(), socket.getaddrinfo

    def noted(host, *rest, **more):
        hosts.add(host)
        return look_up(host, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", noted)
        worker = Worker()
        sessions = load_sessions(runs, worker)
        blocks, address, visitors = launch(sessions, free_port())
        yield address, sessions
        visitors.stop_all()
        blocks.close(verbose=False)
        worker.close()
    assert {str(host) for host in hosts} <= {"127.0.0.1", "localhost", "b'127.0.0.1'", "b'localhost'"}


@pytest.fixture(scope="module")
def ink(chromium):
    """The page without arguments."""
    with served([]) as page:
        yield page


@pytest.fixture(scope="module")
def several(chromium, other, scaled, both):
    """The page of runs with a scale, two controls, and several γ, and of the embedded one."""
    with served([INK, other, scaled, both]) as page:
        yield page


@pytest.fixture
def visit(chromium):
    """Open a page as a new visitor; no error in its console, and no request to elsewhere, at the end."""
    contexts, wrong = [], []

    def opened(address, **options):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        local = (address, "data:", "blob:", address.replace("http", "ws"))
        page.on("request", lambda request: request.url.startswith(local) or wrong.append(request.url))
        page.goto(address)
        finished(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def finished(page, words="as asked"):
    """Wait until a drawing is whole."""
    page.locator(".downloads:visible").first.wait_for()


def shown(page, side):
    """The pixels of the pictures on one side."""
    addresses = page.locator(f".{side}:visible img.picture").evaluate_all("images => images.map(i => i.src)")
    return np.array([np.asarray(Image.open(io.BytesIO(base64.b64decode(a.partition(",")[2])))) for a in addresses])


def expected(session, **asked):
    """What a session draws, which test_session.py compares with `ctrl sample`."""
    *_, drawing = session.draw(Request.checked(session.run, {**ASKED, **asked}), Event())
    return pixels_of(drawing.prior), pixels_of(drawing.ctrl)


def until_shown(page, session, **asked):
    """Wait until the page shows what a session draws."""
    prior, ctrl = expected(session, **asked)
    page.wait_for_function("n => document.querySelectorAll('.ctrl img.picture').length == n", arg=len(ctrl))
    for _ in range(100):
        if len(seen := shown(page, "ctrl")) == len(ctrl) and (seen == ctrl).all():
            break
        page.wait_for_timeout(100)
    assert (shown(page, "ctrl") == ctrl).all()
    assert (shown(page, "prior") == prior).all()


def slide(page, label, value):
    """Type a number into the box beside a slider."""
    box = page.get_by_label(f"number input for {label}")
    box.wait_for()
    page.wait_for_timeout(300)  # a drawer that was just opened is not alive at once
    box.fill(str(value))
    box.press("Tab")


def test_the_page_opens_with_a_drawing_and_says_what_it_is(ink, visit):
    address, (session,) = ink
    page = visit(address)
    until_shown(page, session)
    words = page.locator(".status:visible .words").inner_text()
    assert re.match(
        r"\d+ of 16 as asked so far\. Of many, a perfect learner has \d+% right\. Certificate: at most", words
    )
    assert page.locator(".ctrl figcaption").first.inner_text().startswith("p̂ ")
    assert page.locator(".ctrl figure").first.locator("img").bounding_box()["width"] >= 80


def test_each_control_changes_the_pictures(ink, visit):
    address, (session,) = ink
    page = visit(address)
    page.get_by_label("1", exact=True).check(force=True)
    until_shown(page, session, labels={"ink": "1"})
    page.get_by_label("digit").click()
    page.get_by_role("option", name="7").click()
    until_shown(page, session, labels={"ink": "1"}, c="7")
    slide(page, "strength", 1.5)
    until_shown(page, session, labels={"ink": "1"}, c="7", strength=1.5)
    assert "No certificate for strength 1.5" in page.locator(".status:visible .words").inner_text()
    slide(page, "how many", 3)
    until_shown(page, session, labels={"ink": "1"}, c="7", strength=1.5, n=3)
    page.get_by_text("Noise and steps").click()
    slide(page, "steps", 5)
    until_shown(page, session, labels={"ink": "1"}, c="7", strength=1.5, n=3, steps=5)
    page.get_by_label("seed").fill("11")
    page.get_by_label("seed").press("Enter")
    until_shown(page, session, labels={"ink": "1"}, c="7", strength=1.5, n=3, steps=5, seed=11)


def test_null_is_the_prior(ink, visit):
    address, (session,) = ink
    page = visit(address)
    page.get_by_label("none").check(force=True)
    until_shown(page, session, labels={"ink": ""})
    assert (shown(page, "ctrl") == shown(page, "prior")).all()
    assert "nothing to certify" in page.locator(".status:visible .words").inner_text()


def test_another_noise_each_time_if_wanted(ink, visit):
    address, (session,) = ink
    page = visit(address)
    before = shown(page, "prior")
    page.get_by_text("Noise and steps").click()
    page.get_by_label("same noise each time").uncheck()
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function("() => document.querySelector('input[aria-label=seed], [id] input[type=number]')")
    page.wait_for_timeout(500)
    finished(page)
    seed = int(page.get_by_label("seed").input_value())
    assert seed != 0
    until_shown(page, session, seed=seed)
    assert not (shown(page, "prior") == before).all()


def test_a_drawing_is_stopped_and_begun_again(ink, visit):
    address, (session,) = ink
    page = visit(address)
    page.get_by_text("Noise and steps").click()
    slide(page, "steps", 80)
    slide(page, "how many", 64)
    page.locator(".ctrl figure.empty").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped. Draw begins again.").wait_for()
    assert page.locator(".ctrl figure.empty").count() > 0
    slide(page, "how many", 2)
    until_shown(page, session, steps=80, n=2)


def test_the_last_of_quick_changes_counts(ink, visit):
    address, (session,) = ink
    page = visit(address)
    for value in "1231":
        page.get_by_label(value, exact=True).check(force=True)
    until_shown(page, session, labels={"ink": "1"})


def test_two_tabs_at_once_have_their_own_pictures(ink, visit):
    """The second does not wait for all of the first, which asks for many."""
    address, (session,) = ink
    first, second = visit(address), visit(address)
    first.get_by_text("Noise and steps").click()
    slide(first, "steps", 80)
    slide(first, "how many", 64)
    first.locator(".ctrl figure.empty").first.wait_for()
    second.get_by_label("2", exact=True).check(force=True)
    until_shown(second, session, labels={"ink": "2"})
    assert first.locator(".ctrl figure.empty").count() > 0
    first.get_by_role("button", name="Stop").click()


def test_the_keyboard_is_enough(ink, visit):
    """From the top: by tabs to one of the buttons of ink, and space to press it."""
    address, (session,) = ink
    page = visit(address)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.value") == "2":
            break
    assert page.evaluate("document.activeElement.type") == "radio"
    outline = page.evaluate("getComputedStyle(document.activeElement.closest('label')).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Space")
    until_shown(page, session, labels={"ink": "2"})


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_and_words_can_be_read(ink, visit, width, scheme):
    """WCAG's contrast of text, 4.5 to 1, of the words under a picture and above."""
    address, _ = ink
    page = visit(address, color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".ctrl img.picture").first.bounding_box()["width"] >= 60
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for words in (".ctrl figcaption", ".ctrl figcaption i", ".words", ".legend", ".hit", ".miss", ".downloads a"):
        ink_of = page.locator(words).first.evaluate("element => getComputedStyle(element).color")
        light, dark = sorted((luminance(ink_of), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, words


def luminance(colour):
    """WCAG's relative luminance of a colour as rgb(…)."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_downloads_are_whole(ink, visit):
    address, (session,) = ink
    page = visit(address)
    with page.expect_download() as event:
        page.get_by_role("link", name="Download zip").click()
    archive = zipfile.ZipFile(event.value.path())
    files = [name for name in archive.namelist() if re.fullmatch(r"\d{5}\.png", name)]
    got = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in files])
    assert (got == expected(session)[1]).all()
    assert archive.read("command.txt").decode().startswith("ctrl sample ")
    with page.expect_download() as event:
        page.get_by_role("link", name="Download PNG").click()
    assert Image.open(event.value.path()).size[0] > 96 * 8


def test_a_grid_is_drawn(ink, visit):
    address, _ = ink
    page = visit(address)
    page.get_by_role("tab", name="sweep").click()
    page.get_by_role("button", name="Draw").locator("visible=true").click()
    page.get_by_text("25 of 25 cells").wait_for()
    assert page.locator(".sweep:visible td img").count() == 25 * 2
    assert page.locator(".sweep:visible thead th").all_inner_texts()[1:] == ["0", "0.5", "1", "1.5", "2"]


def test_every_kind_of_run_has_its_tab(several, visit):
    """A slider with the scale's numbers and null, γ where there are several, two controls."""
    address, (_, gammas, scaled_run, two) = several
    page = visit(address)
    page.get_by_role("tab", name="run", exact=True).click()
    finished(page)
    values, ticks = scaled_run.run.policy.controls["ink"].values, page.locator(".ticks:visible")
    assert ticks.locator("i").count() == len(values)
    numbers = ticks.locator("span")
    assert numbers.all_inner_texts() == [values[0], values[4], values[8]]
    assert all(numbers.nth(i).bounding_box()["x"] < numbers.nth(i + 1).bounding_box()["x"] - 30 for i in range(2))
    page.get_by_label("no ink: leave it to the model").check()
    page.get_by_text("nothing to certify").locator("visible=true").wait_for()
    page.get_by_role("tab", name=gammas.name, exact=True).click()
    page.get_by_label("number input for γ").locator("visible=true").wait_for()
    page.get_by_role("tab", name=two.name, exact=True).click()
    page.get_by_text("With the control: ink 4, slant right").locator("visible=true").wait_for()


def test_two_runs_are_compared_on_the_same_noise(several, visit):
    address, sessions = several
    page = visit(address)
    page.get_by_role("tab", name="compare").click()
    page.get_by_role("button", name="Draw").locator("visible=true").click()
    finished(page)
    page.get_by_text(f"{sessions[1].name}: ink 4").locator("visible=true").wait_for()
    page.wait_for_function("() => [...document.querySelectorAll('.downloads')].filter(d => d.offsetParent).length == 2")
    sides = page.locator(".side:visible")
    assert sides.count() == 2
    assert sides.nth(0).locator("img.picture").count() == sides.nth(1).locator("img.picture").count() == 16


@pytest.fixture(scope="module")
def by_hand(ink):
    """Call a function of the page as its scripts do, without its inputs' bounds; what it yields."""
    import httpx

    address, _ = ink
    config = httpx.get(f"{address}config").json()
    place = next(d["id"] for d in config["dependencies"] if any(event == "load" for _, event in d["targets"]))

    def call(data):
        joined = {"data": data, "fn_index": place, "session_hash": "byhand", "event_data": None}
        answer = httpx.post(f"{address}gradio_api/queue/join", json=joined)
        answer.raise_for_status()
        messages = []
        with httpx.stream("GET", f"{address}gradio_api/queue/data?session_hash=byhand", timeout=60) as stream:
            for line in stream.iter_lines():
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
                    if messages[-1]["msg"] == "process_completed":
                        return json.dumps(messages)
        return None

    return call


@pytest.mark.parametrize(
    ("place", "value"), [(4, 10**6), (4, -1), (4, "many"), (2, 1e9), (0, "9"), (1, "eleven"), (5, 2**40), (3, 10**9)]
)
def test_values_by_hand_are_bounded(by_hand, place, value):
    """In the order of the inputs: ink, digit, strength, steps, how many, seed, same noise."""
    data = ["4", "", 1, 20, 2, 0, True, 0]
    data[place] = value
    said = by_hand(data)
    assert re.search(r"must be|greater than|less than|not in the list|[Ee]rror", said)
    assert "<img" not in said


def test_files_and_other_functions_are_refused(ink):
    import httpx

    address, _ = ink
    for path in ("upload", "run/predict", "api/predict", "call/drawn", "component_server", "proxy=http://example.org"):
        for method in ("POST", "GET"):
            assert httpx.request(method, f"{address}gradio_api/{path}").status_code == 403, path
    long = httpx.post(f"{address}gradio_api/queue/join", content=b"x" * 100_000)
    assert long.status_code == 403
    assert all(d["api_visibility"] == "private" for d in httpx.get(f"{address}config").json()["dependencies"])


def test_only_this_machine_is_served(ink):
    address, _ = ink
    assert address.startswith("http://127.0.0.1:")
    assert HOW.startswith("the page needs a browser")
