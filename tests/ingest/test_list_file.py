"""Lists that lie elsewhere: behind https, in a store, in a file."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fourmill.core import store as stores
from fourmill.core.names import Layout
from fourmill.core.store import LocalStore
from fourmill.ingest.config import SourceConfig
from fourmill.ingest.list_file import list_stamp, local_list
from fourmill.ingest.rows import open_rows
from fourmill.ingest.source import build_source_index, is_current, numbered_rows

BODY = b"".join(b"http://h.test/%d.jpg\tpicture %d\n" % (i, i) for i in range(4000))
LAYOUT = Layout(rows_per_shard=1000, shards_per_block=2, num_blocks=4)


@dataclass
class ListHost:
    """A server with one list, and what it does wrong: each answer takes the next fault."""

    body: bytes = BODY
    tag: str | None = '"one"'
    ranges: bool = True
    faults: list[int | str] = field(
        default_factory=list
    )  # a status; "cut"; "change": cut, and another list from then on
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    host: ListHost
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_HEAD(self) -> None:
        self._answer(b"", len(self.host.body), 200, "HEAD")

    def do_GET(self) -> None:
        host, begin = self.host, 0
        fault = host.faults.pop(0) if host.faults else None
        if isinstance(fault, int):
            return self._answer(b"no", 2, fault, "GET")
        wanted = self.headers.get("Range")
        if wanted and host.ranges and self.headers.get("If-Range") == host.tag:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
        body = host.body[begin:]
        shown = body[: len(body) // 2] if fault in ("cut", "change") else body
        self._answer(
            shown, len(body), 206 if begin else 200, "GET", f"bytes {begin}-{len(host.body) - 1}/{len(host.body)}"
        )
        if fault == "change":
            change(host)

    def _answer(self, body: bytes, length: int, status: int, method: str, content_range: str = "") -> None:
        self.host.asked.append((method, self.headers.get("Range")))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if self.host.tag:
            self.send_header("ETag", self.host.tag)
        if status == 206:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = len(body) < length

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class's name)
        pass


@pytest.fixture
def host() -> Iterator[ListHost]:
    made = ListHost()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"host": made})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        made.url = f"http://127.0.0.1:{server.server_address[1]}/list.tsv"
        yield made
        server.shutdown()
        thread.join()


def fetched(url: str, attempts: int = 3) -> bytes:
    with local_list(url, (0.0,) * attempts) as path:
        data = path.read_bytes()
    assert not path.exists()
    return data


def test_a_list_that_breaks_off_is_taken_up_where_it_stopped(host: ListHost) -> None:
    host.faults = ["cut", 503, "cut"]
    assert fetched(host.url) == BODY
    half, rest = len(BODY) // 2, len(BODY) - len(BODY) // 2
    assert host.asked == [
        ("GET", None),
        ("GET", f"bytes={half}-"),
        ("GET", f"bytes={half}-"),
        ("GET", f"bytes={half + rest // 2}-"),
    ]


def change(host: ListHost) -> None:
    host.body, host.tag = BODY[::-1], '"two"'


@pytest.mark.parametrize(
    "spoil",
    [
        lambda host: setattr(host, "tag", None),
        lambda host: setattr(host, "tag", 'W/"weak"'),
        lambda host: setattr(host, "ranges", False),
    ],
)
def test_a_list_without_ranges_or_validators_starts_again(host: ListHost, spoil: Callable[[ListHost], None]) -> None:
    spoil(host)
    host.faults = ["cut", "cut"]
    assert fetched(host.url) == BODY


def test_a_list_that_changed_meanwhile_is_never_pieced_together(host: ListHost) -> None:
    host.faults = ["change"]
    assert fetched(host.url) == BODY[::-1]


def test_attempts_without_anything_new_are_counted(host: ListHost) -> None:
    host.faults = [503] * 3
    with pytest.raises(ValueError, match=r"cannot be fetched \(HTTP 503\), 3 attempts in a row; try again later"):
        fetched(host.url, 2)
    host.faults, host.asked = [404], []
    with pytest.raises(ValueError, match="HTTP 404; mend its URL"):
        fetched(f"{host.url}?token=secret")
    assert len(host.asked) == 1
    with pytest.raises(ValueError) as caught:
        fetched("http://127.0.0.1:1/list.tsv?token=secret", 0)
    assert "secret" not in str(caught.value) and "cannot be fetched" in str(caught.value)


def test_an_unchanged_remote_list_is_asked_for_but_not_fetched_again(tmp_path: Path, host: ListHost) -> None:
    store, config = LocalStore(tmp_path), SourceConfig(list=host.url)
    assert build_source_index(store, "pics", config, LAYOUT).num_rows == 4000
    host.asked.clear()
    assert is_current(store, "pics", config)
    assert host.asked == [("HEAD", None)]
    change(host)
    host.body = BODY + BODY
    assert not is_current(store, "pics", config)


def test_a_server_that_is_away_does_not_stop_what_is_numbered(tmp_path: Path, host: ListHost) -> None:
    store, config = LocalStore(tmp_path), SourceConfig(list=host.url)
    build_source_index(store, "pics", config, LAYOUT)
    away = SourceConfig(list="http://127.0.0.1:1/list.tsv")
    assert list_stamp(away) is None and is_current(store, "pics", away)
    host.tag = None
    assert list_stamp(config) == "" and is_current(store, "pics", config)  # nothing to go by: read again


def test_a_list_in_a_store_is_read_through_its_opener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket" / "lists").mkdir(parents=True)
    (tmp_path / "bucket" / "lists" / "a.tsv").write_bytes(BODY)
    monkeypatch.setattr(stores, "_openers", {})
    stores.register_opener("cellar", lambda root: LocalStore(tmp_path / root.removeprefix("cellar://")))
    with open_rows(SourceConfig(list="cellar://bucket/lists/a.tsv")) as rows:
        assert sum(batch.num_rows for batch in rows()) == 4000
    store, config = LocalStore(tmp_path / "store"), SourceConfig(list="cellar://bucket/lists/a.tsv")
    assert build_source_index(store, "pics", config, LAYOUT).num_rows == numbered_rows(store, "pics", config) == 4000
    with monkeypatch.context() as still:
        still.setattr("fourmill.ingest.list_file._copy", lambda place, file: pytest.fail("the list was fetched again"))
        assert is_current(store, "pics", config)
    (tmp_path / "bucket" / "lists" / "a.tsv").write_bytes(BODY + BODY)
    assert not is_current(store, "pics", config) and numbered_rows(store, "pics", config) is None
    with pytest.raises(ValueError, match=r"no list at 'cellar://bucket/lists/b\.tsv'"):
        fetched("cellar://bucket/lists/b.tsv")
    with pytest.raises(ValueError, match=r"attic:// is not served"):
        fetched("attic://bucket/lists/a.tsv")


def test_a_full_disk_is_said_with_the_folder(host: ListHost, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full:
        def __init__(self, url: str, file: object) -> None:
            pass

        def attempt(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("fourmill.ingest.list_file._Download", Full)
    with pytest.raises(ValueError, match=r"cannot be copied to .*No space left on device.*TMPDIR"):
        fetched(host.url)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_bytes(BODY)
    with local_list(f"file://{tmp_path}/list.tsv") as path:
        assert path == tmp_path / "list.tsv"
