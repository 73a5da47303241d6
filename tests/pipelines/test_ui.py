"""The UI over the demo's state, looked at with a real browser: the asset graph with its groups."""

import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from fourmill.pipelines import ui_cli

DEADLINE_S = 300
ServeUi = Callable[[Path], AbstractContextManager[int]]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
REQUIRED = os.environ.get("FOURMILL_REQUIRE_BROWSER") == "1"
pytestmark = [pytest.mark.servers, pytest.mark.ray]


@pytest.fixture(scope="module")
def ui(smallest_demo: Path, serve_ui: ServeUi) -> Iterator[str]:
    """`fourmill ui` over the smallest demo, until the module's tests are done."""
    with serve_ui(smallest_demo) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_webserver_answers(ui: str) -> None:
    with urllib.request.urlopen(f"{ui}/server_info", timeout=60) as answer:
        assert b"dagster_version" in answer.read()


@pytest.mark.parametrize(("start", "is_said"), [(("-m", "dagster"), True), (("-c", ui_cli._DAGSTER), False)])
def test_the_ui_starts_without_dagsters_warnings(start: tuple[str, str], is_said: bool, tmp_path: Path) -> None:
    """In a folder whose dagster.yaml is not the project's; a home that is not there ends it before any server starts."""
    (tmp_path / "dagster.yaml").touch()
    home = {"DAGSTER_HOME": str(tmp_path / "none")}
    command = [sys.executable, *start, "dev", "-m", "fourmill.pipelines.definitions"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **home}, capture_output=True, text=True, timeout=DEADLINE_S
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0 and str(tmp_path / "none") in said
    assert ("`dev_command` is superseded" in said, "DAGSTER_HOME environment variable is set to" in said) == (
        is_said,
    ) * 2


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
