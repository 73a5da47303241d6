"""A web server on loopback that does what a test tells it, and what else several tests here share."""

import io
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from PIL import Image

from fourmill.core.ledger import BlockReport, ledger_path, write_ledger
from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import ShardPlace, finished, read_rows
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.duplicates import finish_block
from fourmill.ingest.optout import OptOut, publish_opt_out, read_opt_out
from fourmill.ingest.source import build_source_index
from fourmill.ingest.stale import remember_opt_out
from fourmill.ingest.statuses import MAY_PASS
from fourmill.ingest.worker import ImageWorker, images_recipe

HOST = "pictures.test"


@dataclass
class Answer:
    """What the server says to one path."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str | list[str]] = field(default_factory=dict)  # a list makes a line for each
    announce: int | None = None  # Content-Length, when it is not the body's
    chunked: bool = False
    endless: bool = False  # the body again and again as chunks, until the client leaves
    hang: bool = False  # never answers
    stall: bool = False  # never goes on after the body, of which one byte more was announced
    drip: bool = False  # the body byte by byte, ten a second
    reset: bool = False  # breaks the connection off
    cut: bool = False  # breaks the connection off after the body, of which more was announced
    gate: threading.Event | None = None  # answers once it is set


class Site(ThreadingHTTPServer):
    """Paths to answers (the last of a list stays), with a record of who asked for what."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.scheme, self.url_port = "http", 80
        self.connections = 0
        self.most_at_once = 0
        self.ending = threading.Event()
        self.left = threading.Event()  # a client left in the middle of an endless body
        self._busy = 0
        self._change = threading.Condition()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def connect_to(self) -> dict[str, str]:
        return {f"{HOST}:{self.url_port}": f"127.0.0.1:{self.port}"}

    @property
    def counts(self) -> Counter[str]:
        return Counter(path for path, _ in self.asked)

    def put(self, path: str, *answers: Answer) -> str:
        """Set what a path answers; returns its URL."""
        self.answers[path] = list(answers)
        return f"{self.scheme}://{HOST}{path}"

    def use_tls(self, certificate: Path) -> None:
        """Speak https from now on; before the first connection."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.scheme, self.url_port = "https", 443

    def take(self, path: str, headers: dict[str, str]) -> Answer:
        with self._change:
            self.asked.append((path, headers))
            self._busy += 1
            self.most_at_once = max(self.most_at_once, self._busy)
            self._change.notify_all()
            answers = self.answers.get(path, [Answer(status=404)])
            return answers.pop(0) if len(answers) > 1 else answers[0]

    def wait_for(self, num_requests: int) -> None:
        """Wait until so many requests are being answered at once."""
        with self._change:
            assert self._change.wait_for(lambda: self._busy >= num_requests, 180)

    def done(self) -> None:
        with self._change:
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
        if answer.gate is not None:
            answer.gate.wait(180)
        if answer.hang:
            self.server.ending.wait(180)
            self.close_connection = True
            return
        if answer.reset:
            self._break_off()
            return
        self._send_head(answer)
        with suppress(OSError):
            self._send_body(answer)
            self.wfile.flush()
        if answer.cut:
            self._break_off()
        self.close_connection = self.close_connection or answer.announce is not None

    def _send_head(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            for line in [value] if isinstance(value, str) else value:
                self.send_header(name, line)
        more = 500 if answer.cut else 1 if answer.stall else 0
        if answer.chunked or answer.endless:
            self.send_header("Transfer-Encoding", "chunked")
        elif answer.announce is None:
            self.send_header("Content-Length", str(len(answer.body) + more))
        else:
            self.send_header("Content-Length", str(answer.announce))
        self.end_headers()

    def _send_body(self, answer: Answer) -> None:
        chunk = f"{len(answer.body):x}\r\n".encode() + answer.body + b"\r\n"
        if answer.endless:
            with suppress(OSError):
                while not self.server.ending.is_set():
                    self.wfile.write(chunk)
            self.server.left.set()
            self.close_connection = True
        elif answer.drip:
            for byte in answer.body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.ending.wait(0.1):
                    break
        else:
            self.wfile.write(chunk + b"0\r\n\r\n" if answer.chunked else answer.body)
        if answer.stall:
            self.wfile.flush()
            self.server.ending.wait(180)
            self.close_connection = True

    def _break_off(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def running(server: Site) -> Iterator[Site]:
    """Serve while the block runs."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.ending.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    with running(Site()) as server:
        yield server


@pytest.fixture
def other_site() -> Iterator[Site]:
    """A second one, for redirects between hosts."""
    with running(Site()) as server:
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file with the key and the certificate of `pictures.test`, its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "pictures.pem"
    plain_key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(plain_key + made.public_bytes(Encoding.PEM))
    return path


@pytest.fixture
def secure_site(certificate: Path) -> Iterator[Site]:
    server = Site()
    server.use_tls(certificate)
    with running(server):
        yield server


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

    @property
    def opt_out(self) -> OptOut:
        return read_opt_out(self.config.opt_out)

    def recipe(self, split, shard: int):
        return images_recipe(self.store, self.dataset, self.layout, self.config, split, shard, self.opt_out)

    def worker(self, retry_failed: bool = False) -> ImageWorker:
        digest = publish_opt_out(self.store, self.opt_out)
        where = (self.store.root, self.dataset, self.layout, self.config, self.site.connect_to)
        return ImageWorker(*where, opt_out=digest, retry_failed=retry_failed)

    def run(self, block: str, run_id: str = "run", retry_failed: bool = False) -> BlockReport:
        shards, made = self.layout.shards_of(block), 0
        with self.worker(retry_failed) as worker:
            for shard in shards:
                for split in SPLITS:
                    recipe = self.recipe(split, shard)
                    done = finished(self.store, ShardPlace(self.dataset, split, "images", shard), recipe)
                    if done is None or (retry_failed and not MAY_PASS.isdisjoint(done.counts)):
                        for one in SPLITS:
                            self.store.delete(ledger_path(self.dataset, one, "images", block))
                        made += worker.run(ShardJob(split, shard, recipe, run_id)) != done
        finish_block(self.store, self.dataset, self.layout, block)
        remember_opt_out(self.store, self.dataset, block, self.opt_out)
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


class Killed(BaseException):
    """What the process would not have lived to see."""


def _die_at_change(patch: pytest.MonkeyPatch, number: int) -> None:
    """Make the store's change number `number` (0-based: a file published or deleted) the one that does not happen."""
    left = [number]
    create, delete = LocalStore.create, LocalStore.delete

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    @contextmanager
    def dying_create(self: LocalStore, path: str):
        with create(self, path) as stream:
            yield stream
            count()

    def dying_delete(self: LocalStore, path: str) -> None:
        count()
        delete(self, path)

    patch.setattr(LocalStore, "create", dying_create)
    patch.setattr(LocalStore, "delete", dying_delete)


@pytest.fixture
def die_at_every_change(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[int]]:
    """`for _ in die_at_every_change(ingest, prepare, work)`: after `work` died, at each change of the store in turn."""

    def deaths(ingest: Ingest, prepare: Callable[[], object], work: Callable[[], object]) -> Iterator[int]:
        for number in range(200):
            for path in ingest.store.list(""):
                ingest.store.delete(path)
            prepare()
            with monkeypatch.context() as patch:
                _die_at_change(patch, number)
                try:
                    work()
                except Killed:
                    pass
                else:
                    return
            yield number
        raise AssertionError("the work never ended")

    return deaths
