"""Serve the page on this machine, and nothing but the page."""

import inspect
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ...run.run import EMBEDDED_RUN, INK
from .session import Session
from .worker import Visitors, Worker

HOST = "127.0.0.1"
MOST_RUNS, MOST_WAITING, MOST_BYTES = 8, 128, 2**16  # runs; drawings in the queue; bytes of a visitor's request
# what gradio can do besides: take files, fetch addresses, run functions outside the queue, change the page's code
REFUSED = (
    "upload",
    "proxy=",
    "run/",
    "api/",
    "call/",
    "component_server",
    "process_recording",
    "vibe",
    "mcp",
    "stream",
)


class Refuse:
    """Answer 403 to whatever gradio offers that the page does not use, and to more than a page would send."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        path = scope.get("path", "").removeprefix("/gradio_api/").lstrip("/")
        headers = dict(scope.get("headers", ()))
        length = int(headers.get(b"content-length", b"0"))
        too_much = length > MOST_BYTES or b"transfer-encoding" in headers
        if scope["type"] == "http" and (path.startswith(REFUSED) or too_much):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This page takes no files and has no other functions."})
        else:
            await self.app(scope, receive, send)


def check_play(runs: Sequence[Path], port: int) -> None:
    """Refuse (ValueError) what would fail after a while: no gradio, a port that is taken, too many runs."""
    if find_spec("gradio") is None:
        raise ValueError("ctrl play needs gradio, which is not installed. Run: pip install 'ctrl-diffusion[play]'")
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs are too many for one page. Name {MOST_RUNS} at most.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"port {port} is taken ({error.strerror}). Choose another with --port.") from error


def load_sessions(runs: Sequence[Path], worker: Worker, trust: bool = False) -> list[Session]:
    """Open runs, or the embedded one without any; raises ValueError as `Run.load` does. Equal names become paths."""
    embedded = INK if Path(EMBEDDED_RUN).exists() else Path(EMBEDDED_RUN)  # by its name where no folder has that
    sessions = [Session.load(run, worker, trust) for run in runs or [embedded]]
    names = [session.name for session in sessions]
    for session in sessions:
        if names.count(session.name) > 1:
            session.name = session.folder
    if len(names := [session.name for session in sessions]) > len(set(names)):
        raise ValueError("one run is named twice. Name every run once.")
    return sessions


def theme() -> Any:
    """Return a calm theme in the fonts of the visitor's own system: nothing is fetched."""
    import gradio as gr

    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=mono)


@contextmanager
def without_stubs() -> Iterator[None]:
    """Keep gradio from writing type stubs beside its own files, which takes a third of its import's time.

    It writes one for every class whose file `inspect.getfile` knows, and none where that raises OSError.
    """
    known = inspect.getfile

    def unknown(_: Any) -> str:
        raise OSError("no file")

    inspect.getfile = unknown
    try:
        yield
    finally:
        inspect.getfile = known


def launch(
    sessions: Sequence[Session], port: int, share: bool = False, browser: bool = False
) -> tuple[Any, str, Visitors]:
    """Begin to serve the page; return what serves it, its address and its visitors. ValueError if the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, and later
    own = [os.environ.get("NO_PROXY", ""), HOST, "localhost"]  # gradio asks itself for a page at the start
    os.environ["NO_PROXY"] = ",".join(filter(None, own))
    with without_stubs():
        import gradio as gr  # noqa: F401 — after the lines above
    from starlette.middleware import Middleware

    from .page import page

    visitors = Visitors()
    blocks = page(sessions, visitors)
    blocks.queue(api_open=False, max_size=MOST_WAITING, default_concurrency_limit=None)
    try:
        _, local, public = blocks.launch(
            server_name=HOST, server_port=port, share=share, inbrowser=browser, prevent_thread_lock=True, quiet=True,
            show_error=True, footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, max_file_size=1, state_session_capacity=100, theme=theme(),
            css_paths=Path(__file__).with_name("page.css"), app_kwargs={"middleware": [Middleware(Refuse)]},
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"the page cannot be served at port {port}: {error}. Choose another with --port.") from error
    return blocks, public or local, visitors


def serve(
    runs: Sequence[Path], port: int, share: bool = False, browser: bool = True, trust: bool = False,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Open the page of some runs, and serve it until an interrupt; raises ValueError as `check_play` and `Run.load`."""
    check_play(runs, port)
    worker, stop = Worker(), Event()
    try:
        sessions = load_sessions(runs, worker, trust)
        Thread(target=sessions[0].draw_ahead, args=(stop,), daemon=True).start()  # while gradio begins
        blocks, address, visitors = launch(sessions, port, share, browser)
        try:
            say(f"the page is at {address} — Ctrl-C ends it")
            Event().wait()
        finally:
            visitors.stop_all()
            blocks.close(verbose=False)
    except KeyboardInterrupt:
        say("ended")
    finally:
        stop.set()
        worker.close()
