"""Starting and ending the page: mistakes are one line, and an interrupt is no traceback."""

import signal
import socket
import subprocess
import sys

import pytest

from ctrl_diffusion.report.play import server
from ctrl_diffusion.report.play.compare import comparable
from ctrl_diffusion.report.play.worker import Worker
from tests.report.play.conftest import HOW, free_port


def one_line(done, message):
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_runs_that_cannot_be_shown_are_one_line(ctrl_here, tmp_path):
    pytest.importorskip("gradio", reason=HOW)
    port = free_port()
    one_line(ctrl_here("play", tmp_path / "none", "--port", port, "--no-browser"), "there is no folder")
    one_line(ctrl_here("play", tmp_path, "--port", port, "--no-browser"), "is not a run folder")
    (tmp_path / "config.yaml").write_bytes((server.INK / "config.yaml").read_bytes())
    one_line(
        ctrl_here("play", tmp_path, "--port", port, "--no-browser"), "unfinished run: it lacks classifier, control"
    )
    one_line(ctrl_here("play", server.INK, server.INK, "--port", port, "--no-browser"), "one run is named twice")
    one_line(ctrl_here("play", *[server.INK] * 9, "--port", port, "--no-browser"), "9 runs are too many for one page")


def test_a_port_that_is_taken_is_one_line(ctrl_here):
    pytest.importorskip("gradio", reason=HOW)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_line(ctrl_here("play", "--port", port, "--no-browser"), f"port {port} is taken")


def test_without_gradio_the_way_to_it_is_one_line(ctrl_here, monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    one_line(ctrl_here("play", "--no-browser"), "pip install 'ctrl-diffusion[play]'")


def test_runs_of_two_priors_are_not_compared(open_session, finished):
    ink, text = open_session(), open_session(finished)
    with pytest.raises(
        ValueError, match=r"cannot be compared: their prior is digits and .* Choose two runs of one prior"
    ):
        comparable(ink, text)
    with pytest.raises(ValueError, match="choose two different runs"):
        comparable(ink, ink)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_ends_the_page_without_a_traceback(sent):
    pytest.importorskip("gradio", reason=HOW)
    command = [sys.executable, "-m", "ctrl_diffusion", "play", "--no-browser", "--port", str(free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell's job in the background ignores Ctrl-C, and so would its children
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL), **pipes)
    assert "the page is at http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "ctrl: ended\n", "")


def test_the_embedded_run_has_a_name_where_no_folder_has_it(ctrl_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ctrl_here("sample", "ink", "--set", "ink=4", "-n", 1, "--out", "one").returncode == 0
    (session,) = server.load_sessions([], Worker())
    assert (session.name, session.folder, session.metrics["learned"]) == ("ink", "ink", True)
    (tmp_path / "ink").mkdir()
    one_line(ctrl_here("sample", "ink", "--out", "two"), "ink is not a run folder")
    (session,) = server.load_sessions([], Worker())
    assert session.folder == str(server.INK)
