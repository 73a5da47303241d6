"""Servers that tests here use over real connections: S3 (ministack, and moto as the second opinion), and pictures."""

import http.client
import io
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fourmill.core.store import Store, open_store
from fourmill.runtime.s3_client import forget_client, make_client

_ROOT = Path(__file__).parents[2]
_BUCKET = "fourmill-tests"
_DEADLINE_S = 180


class S3Server:
    """One server on loopback, or the one that `FOURMILL_TEST_S3` names (for ministack, which keeps its data over a restart)."""

    def __init__(self, product: str, folder: Path, endpoint: str | None = None) -> None:
        self.product, self._folder = product, folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0 if endpoint else _free_port()
        self.endpoint = endpoint or f"http://127.0.0.1:{self.port}"
        if endpoint is None:
            self.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the server, and nothing of the user's own settings."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": os.environ.get("FOURMILL_TEST_S3_KEY", "test"),
            "AWS_SECRET_ACCESS_KEY": os.environ.get("FOURMILL_TEST_S3_SECRET", "test"),
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def start(self) -> None:
        """Start, on the same port and with the same data as before, and wait until it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        binaries = _ROOT / {"ministack": ".venv-s3", "moto": ".venv-moto"}[self.product] / "bin"
        command = {
            "ministack": [binaries / "ministack"],
            "moto": [binaries / "moto_server", "-H", "127.0.0.1", "-p", str(self.port)],
        }[self.product]
        if not command[0].exists():
            pytest.fail(f"{command[0]} is not there; `make servers` installs it")
        settings = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(self.port), "SERVICES": "s3"}
        settings |= {"S3_PERSIST": "1", "S3_DATA_DIR": str(self._folder / "data")}
        with (self._folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                env={**os.environ, **settings},
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        self._wait()

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def fresh_root(self, patch: pytest.MonkeyPatch) -> str:
        """An empty root, which this process can open from now on."""
        for name, value in self.environment.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        forget_client()
        client = make_client()
        if _BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=_BUCKET)
        return f"s3://{_BUCKET}/{uuid.uuid4().hex}"

    def _wait(self) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        assert self._process
        while time.monotonic() < deadline and self._process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                connection.request("GET", "/")
                if connection.getresponse().status < 500:
                    return
            except (OSError, http.client.HTTPException):
                with suppress(subprocess.TimeoutExpired):  # ended: the loop sees it; not yet: it answers soon
                    self._process.wait(0.1)
            finally:
                connection.close()
        log = (self._folder / "log.txt").read_text()[-2000:]
        pytest.fail(f"{self.product} did not answer on port {self.port} within {_DEADLINE_S} s:\n{log}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _serve(product: str, folder: Path) -> Iterator[S3Server]:
    server = S3Server(product, folder, os.environ.get("FOURMILL_TEST_S3") if product == "ministack" else None)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    yield from _serve("ministack", tmp_path_factory.mktemp("ministack"))


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    yield from _serve("moto", tmp_path_factory.mktemp("moto"))


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[S3Server]:
    """A ministack of a test's own, to be killed and started again."""
    server = S3Server("ministack", tmp_path / "s3")
    yield server
    server.stop()


@pytest.fixture(params=["ministack", "moto"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Either server, with this process's environment set for it."""
    server: S3Server = request.getfixturevalue(request.param)
    server.fresh_root(monkeypatch)
    yield server
    forget_client()


@pytest.fixture(params=["local", "ministack", "moto"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Each kind of store, empty."""
    if request.param == "local":
        yield open_store(str(tmp_path / "store"))
        return
    server: S3Server = request.getfixturevalue(request.param)
    yield open_store(server.fresh_root(monkeypatch))
    forget_client()


class Pictures(ThreadingHTTPServer):
    """A list of pictures and the server they are on; `on_request` is told the number of each request, before its answer."""

    daemon_threads = True
    host = "pictures.test"

    def __init__(self, folder: Path, num: int, side_px: int) -> None:
        self.asked = 0
        self.on_request: Callable[[int], None] = lambda number: None
        self._lock = threading.Lock()
        self.files = {f"/{i}.jpg": _jpeg(i, side_px) for i in range(num)}
        self.files[f"/{num - 1}.jpg"] = self.files["/1.jpg"]  # a duplicate
        self.files["/html.jpg"] = b"<html>"
        self.list = folder / "list.tsv"
        rows = [f"http://{self.host}{path}\tpicture {path}" for path in self.files]
        rows += ["no tab", f"http://{self.host}/dead.jpg\tdead", f"http://{self.host}/0.jpg\tagain"]
        self.list.write_text("".join(f"{row}\n" for row in rows))
        super().__init__(("127.0.0.1", 0), _PictureHandler)

    @property
    def connect_to(self) -> dict[str, str]:
        return {f"{self.host}:80": f"127.0.0.1:{self.server_address[1]}"}

    def count(self) -> None:
        with self._lock:
            self.asked += 1
            number = self.asked
        self.on_request(number)


class _PictureHandler(BaseHTTPRequestHandler):
    server: Pictures  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        self.server.count()
        body = self.server.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def _jpeg(seed: int, side_px: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=90)
    return sink.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Pictures]:
    """44 pictures of about 15 kB and a few rows that fail: six shards of eight rows."""
    with Pictures(tmp_path, num=44, side_px=128) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
