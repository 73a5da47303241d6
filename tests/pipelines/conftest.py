"""`fourmill ui` on a free port, for tests that look at it or press its buttons; and a list whose downloads never end."""

import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from fourmill.core.store import open_store
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.source import build_source_index
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.workspace import Workspace

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


@pytest.fixture
def silent_list(tmp_path: Path) -> Iterator[tuple[Workspace, threading.Event, threading.Event]]:
    """A project whose pictures are asked for and never come; when somebody waits for one, and when nobody does any more."""
    asked, left = threading.Event(), threading.Event()

    class Silence(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            self.connection.settimeout(_DEADLINE_S)
            if not self.connection.recv(1):
                left.set()
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Silence)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    workspace = Workspace(tmp_path / "out")
    rows = "".join(f"http://127.0.0.1:{server.server_port}/{row}.jpg\tcaption {row}\n" for row in range(20))
    (tmp_path / "list.tsv").write_text(rows)
    base = smallest(workspace.out)
    source = base.source.model_copy(update={"list": str(tmp_path / "list.tsv")})
    ingest = IngestConfig(allow_hosts=("127.0.0.1",), first_byte_timeout_s=3600, total_timeout_s=3600)
    project = base.model_copy(update={"source": source, "ingest": ingest})
    workspace.keep(project)
    build_source_index(open_store(project.store), project.dataset, project.source, project.layout)
    yield workspace, asked, left
    server.shutdown()
    thread.join()
    server.server_close()
