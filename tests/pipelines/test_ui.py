"""The UI over the demo's state, looked at with a real browser: the asset graph with its groups."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

DEADLINE_S = 300
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = os.environ.get("FOURMILL_REQUIRE_BROWSER") == "1"
pytestmark = [pytest.mark.servers, pytest.mark.ray]


@pytest.fixture(scope="module")
def ui(smallest_demo: Path) -> Iterator[str]:
    """`fourmill ui` on a free port, until the module's tests are done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fourmill.pipelines.cli", "ui", "--out", str(smallest_demo), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield wait_for(f"http://127.0.0.1:{port}", process)
    finally:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(tree, timeout=60)
        for left in alive:
            left.kill()
        process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> str:
    """Poll until the server answers."""
    pause, waited = threading.Event(), 0.0
    while waited < DEADLINE_S:
        assert process.poll() is None, "fourmill ui ended by itself"
        try:
            with urllib.request.urlopen(f"{url}/server_info", timeout=10):
                return url
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            pause.wait(0.5)
            waited += 0.5
    raise AssertionError(f"{url} did not answer within {DEADLINE_S} s")


def test_the_webserver_answers(ui: str) -> None:
    with urllib.request.urlopen(f"{ui}/server_info", timeout=60) as answer:
        assert b"dagster_version" in answer.read()


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None and not REQUIRED, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_asset_graph_shows_every_group(ui: str, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    assert BROWSER is not None, "FOURMILL_REQUIRE_BROWSER is set and there is no Chromium"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(f"{ui}/asset-groups", wait_until="domcontentloaded", timeout=DEADLINE_S * 1000)
        for group in ("ingest", "labels", "tokenizers", "tokens", "fourm"):
            page.get_by_text(group, exact=True).first.wait_for(timeout=DEADLINE_S * 1000)
        picture = tmp_path / "graph.png"
        page.screenshot(path=str(picture))
        browser.close()
    assert picture.stat().st_size > 10_000
