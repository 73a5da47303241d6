"""A web server on loopback that does what a test tells it, and what else several tests here share."""

import io
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fourmill.core.ledger import BlockReport, write_ledger
from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import ShardPlace, finished, read_rows
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.duplicates import finish_block
from fourmill.ingest.source import build_source_index
from fourmill.ingest.worker import ImageWorker, images_recipe

HOST = "pictures.test"


@dataclass
class Answer:
    """What the server says to one path."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    announce: int | None = None  # Content-Length, when it is not the body's
    chunked: bool = False
    hang: bool = False  # never answers
    reset: bool = False  # breaks the connection off


class Site(ThreadingHTTPServer):
    """Paths to answers (the last of a list stays), with a record of who asked for what."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self.most_at_once = 0
        self.ending = threading.Event()
        self._busy = 0
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def connect_to(self) -> dict[str, str]:
        return {f"{HOST}:80": f"127.0.0.1:{self.port}"}

    @property
    def counts(self) -> Counter[str]:
        return Counter(path for path, _ in self.asked)

    def put(self, path: str, *answers: Answer) -> str:
        """Set what a path answers; returns its URL."""
        self.answers[path] = list(answers)
        return f"http://{HOST}{path}"

    def take(self, path: str, headers: dict[str, str]) -> Answer:
        with self._lock:
            self.asked.append((path, headers))
            self._busy += 1
            self.most_at_once = max(self.most_at_once, self._busy)
            answers = self.answers.get(path, [Answer(status=404)])
            return answers.pop(0) if len(answers) > 1 else answers[0]

    def done(self) -> None:
        with self._lock:
            self._busy -= 1

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients leave early on purpose here


class _Handler(BaseHTTPRequestHandler):
    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self) -> None:
        answer = self.server.take(self.path, {name.lower(): value for name, value in self.headers.items()})
        try:
            self._send(answer)
        finally:
            self.server.done()

    def _send(self, answer: Answer) -> None:
        if answer.hang:
            self.server.ending.wait(30)
            self.close_connection = True
            return
        if answer.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(answer.body) if answer.announce is None else answer.announce))
        self.end_headers()
        body = f"{len(answer.body):x}\r\n".encode() + answer.body + b"\r\n0\r\n\r\n" if answer.chunked else answer.body
        with suppress(ConnectionError):
            self.wfile.write(body)
        self.close_connection = answer.announce is not None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.ending.set()
        server.shutdown()
        thread.join()


def quick_config(**changes: object) -> IngestConfig:
    """Defaults for tests: no waiting between attempts."""
    return IngestConfig.model_validate({"retry_wait_s": 0.0, "max_retry_wait_s": 0.0, **changes})


def jpeg(seed: int, width: int = 24, height: int = 16, **options: object) -> bytes:
    """A small JPEG; another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    sink = io.BytesIO()
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    image.save(sink, "JPEG", quality=90, **options)  # pyright: ignore[reportArgumentType]
    return sink.getvalue()


@dataclass
class Ingest:
    """A store, a list and a worker, driven as the runtime drives them."""

    folder: Path
    site: Site
    layout: Layout = field(default_factory=lambda: Layout(rows_per_shard=4, shards_per_block=2, num_blocks=2))
    config: IngestConfig = field(default_factory=quick_config)
    val_fraction: float = 0.4
    dataset: str = "pics"

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.folder / "store")

    def number(self, lines: list[str]):
        path = self.folder / "list.tsv"
        path.write_text("".join(f"{line}\n" for line in lines))
        source = SourceConfig(list=str(path), val_fraction=self.val_fraction)
        return build_source_index(self.store, self.dataset, source, self.layout)

    def recipe(self, split, shard: int):
        return images_recipe(self.store, self.dataset, self.layout, self.config, split, shard)

    def run(self, block: str, run_id: str = "run") -> BlockReport:
        worker = ImageWorker(self.store.root, self.dataset, self.layout, self.config, self.site.connect_to)
        shards, made = self.layout.shards_of(block), 0
        for shard in shards:
            for split in SPLITS:
                recipe = self.recipe(split, shard)
                if not finished(self.store, ShardPlace(self.dataset, split, "images", shard), recipe):
                    worker.run(ShardJob(split, shard, recipe, run_id))
                    made += 1
        finish_block(self.store, self.dataset, self.layout, block)
        return write_ledger(self.store, self.dataset, "images", block, shards, "pics/images", made)

    def rows(self) -> dict[int, dict]:
        """All rows of all done shards, by row number."""
        found: dict[int, dict] = {}
        for shard in range(self.layout.shards_per_block * self.layout.num_blocks):
            for split in SPLITS:
                place = ShardPlace(self.dataset, split, "images", shard)
                if self.store.exists(place.rows):
                    for row in read_rows(self.store, place).to_pylist():
                        assert int(row["key"]) not in found
                        found[int(row["key"])] = {**row, "split": split}
        return found

    def files(self) -> dict[str, bytes]:
        return {path: self.store.read(path) for path in self.store.list(self.dataset)}


@pytest.fixture
def ingest(tmp_path: Path, site: Site) -> Ingest:
    return Ingest(tmp_path, site)


@pytest.fixture(name="jpeg")
def jpeg_maker() -> Callable[..., bytes]:
    return jpeg


@pytest.fixture(name="answer")
def answer_maker() -> type[Answer]:
    return Answer


@pytest.fixture(name="quick_config")
def quick_config_maker() -> Callable[..., IngestConfig]:
    return quick_config
