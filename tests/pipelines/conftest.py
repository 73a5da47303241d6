"""`fourmill ui` on a free port, for tests that look at it or press its buttons."""

import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest

_DEADLINE_S = 300

ServeUi = Callable[[Path], AbstractContextManager[int]]


@contextmanager
def _serving(out: Path) -> Iterator[int]:
    """The UI over a project's folder while the block runs; its port on 127.0.0.1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fourmill.pipelines.cli", "ui", "--out", str(out), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_for(port, process)
        yield port
    finally:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=180)
        for left in alive:
            left.kill()
        process.wait()
        assert not alive, f"the UI was asked to end and left {alive}"


@pytest.fixture(scope="session")
def serve_ui() -> ServeUi:
    """`with serve_ui(out) as port`: the UI over a project's folder."""
    return _serving


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    pause, waited = threading.Event(), 0.0
    while waited < _DEADLINE_S:
        assert process.poll() is None, "fourmill ui ended by itself"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=10):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            pause.wait(0.5)
            waited += 0.5
    raise AssertionError(f"the UI did not answer within {_DEADLINE_S} s")
