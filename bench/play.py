"""Measure the page of `ctrl play`: docs/how-to/play.md, bench/results/play.json, and its two screenshots.

python bench/play.py                     (some minutes on two quiet cores; needs Chromium)
python bench/play.py first|redraw|weight|memory|screenshots …

first    seconds from the command to the first picture in the browser, over those of importing torch and diffusers
redraw   seconds from a click on another label to 16 new digits in the browser, over those of `Run.sample` of the same
weight   bytes that one visit transfers, pictures included
memory   resident bytes of the server over 500 redraws: growth from the 100th to the last, per redraw
"""

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, Page, sync_playwright

from ctrl_diffusion.run.run import INK, Run
from ctrl_diffusion.system.files import rounded

HERE = Path(__file__).parent
RESULTS, PICTURES = HERE / "results" / "play.json", HERE.parent / "docs" / "pictures"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROUNDS, CHANGES, REDRAWS, SETTLED = 3, 12, 500, 100
FIRST = ".ctrl img.picture"
SHOTS = {"play.png": (1280, 900), "play-phone.png": (390, 844)}


@contextmanager
def served() -> Iterator[tuple[str, subprocess.Popen]]:
    """Start `ctrl play` in a process of its own; its address and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ctrl_diffusion", "play", "--no-browser", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if "the page is at" not in line:
            raise RuntimeError(f"the page did not start: {line!r}")
        yield f"http://127.0.0.1:{port}/", process
    finally:
        process.terminate()
        process.wait(60)


def opened(browser: Browser, address: str, width: int = 1280, height: int = 900) -> Page:
    """Open the page as a new visitor, and wait for its first drawing."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector(".downloads")
    return page


def change(page: Page, value: str) -> float:
    """Ask for another ink; return the seconds until all of its pictures are there."""
    whole = "document.querySelector('.ctrl h3').innerText.endsWith('ink ' + v) && document.querySelector('.downloads')"
    began = time.perf_counter()
    page.get_by_label(value, exact=True).check(force=True)
    page.wait_for_function(f"v => {whole}", arg=value, polling=20)
    return time.perf_counter() - began


def first(browser: Browser) -> dict[str, Any]:
    """Measure the seconds from the command to the first picture."""
    seconds, imports = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, diffusers"], check=True)
        imports.append(time.perf_counter() - began)
        began = time.perf_counter()
        with served() as (address, _process):
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector(FIRST, timeout=120_000)
            seconds.append(time.perf_counter() - began)
            page.close()
    middle = statistics.median(seconds)
    return {"seconds": middle, "over_imports": middle / statistics.median(imports)}


def redraw(browser: Browser) -> dict[str, Any]:
    """Measure the seconds of a change of y, of a new seed each fourth, and those of `Run.sample`, in turn."""
    run, c = Run.load(INK), torch.arange(16) % 10
    clicks, samples = [], []
    with served() as (address, _):
        page = opened(browser, address)
        page.get_by_text("Noise and steps").click()
        for i in range(CHANGES):
            if i % 4 == 0:  # what is drawn twice is kept
                page.get_by_label("seed").fill(str(1 + i))
            clicks.append(change(page, "1234"[i % 4]))
            began = time.perf_counter()
            run.sample(torch.full((16,), i % 4), c, generator=torch.Generator().manual_seed(1 + i))
            samples.append(time.perf_counter() - began)
        page.close()
    clicks, samples = clicks[2:], samples[2:]
    return {"seconds": statistics.median(clicks), "over_sample": statistics.median(clicks) / statistics.median(samples)}


def weight(browser: Browser) -> dict[str, Any]:
    """Count the bytes a new visitor's browser receives, and where from."""
    with served() as (address, _):
        page, sizes, hosts = browser.new_page(), [], set()
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
        page.on("request", lambda request: request.url.startswith("http") and hosts.add(request.url.split("/")[2]))
        page.goto(address)
        page.wait_for_selector(".downloads", timeout=120_000)
        page.wait_for_timeout(1000)
        size = sum(sizes) + len(page.locator(".pictures").first.inner_html())  # of the stream, which stays open
        page.close()
    return {"bytes": int(size), "requests": len(sizes), "hosts": len(hosts)}


def resident(process: subprocess.Popen) -> int:
    """Return the bytes of memory that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def memory(browser: Browser) -> dict[str, Any]:
    """Follow the server's memory over many redraws, of a new seed each fourth."""
    held = []
    with served() as (address, process):
        page = opened(browser, address)
        page.get_by_text("Noise and steps").click()
        for i in range(REDRAWS):
            change(page, "1234"[i % 4])
            if i % 4 == 3:
                page.get_by_label("seed").fill(str(i))
            held.append(resident(process))
        page.close()
    tail = held[SETTLED:]
    growth = statistics.mean(tail[-50:]) - statistics.mean(tail[:50])
    return {"redraws": REDRAWS, "settled_bytes": tail[0], "growth_bytes": growth, "growth_share": growth / tail[0]}


def screenshots(browser: Browser) -> dict[str, Any]:
    """Write the two pictures of docs/how-to/play.md."""
    with served() as (address, _):
        for name, (width, height) in SHOTS.items():
            page = opened(browser, address, width, height)
            change(page, "3")
            change(page, "4")
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)
            page.screenshot(path=PICTURES / name, full_page=True)
            page.close()
    return {"files": list(SHOTS)}


PARTS = {"first": first, "redraw": redraw, "weight": weight, "memory": memory, "screenshots": screenshots}


def main() -> None:
    """Command line: measure some parts, or all, and keep the others' figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    names = parser.parse_args().parts or list(PARTS)
    figures = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in names:
            figures[name] = rounded(PARTS[name](browser))
            print(name, json.dumps(figures[name]), flush=True)
        browser.close()
    figures.pop("screenshots", None)
    rows = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in sorted(figures.items()))
    RESULTS.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
