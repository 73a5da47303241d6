"""S3 at its worst: broken connections, lost answers, a server that dies, wrong settings."""

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from fourmill.core.store import StoreError, StoreFullError, open_store
from fourmill.runtime import s3_client
from fourmill.runtime.s3_client import ask, forget_client, make_client
from fourmill.runtime.s3_streams import ObjectWriter

MB = 1024**2
_CONTENT = bytes(range(251)) * (3 * MB // 251)
_BODY_FOLLOWS = re.compile(rb"HTTP/1\.[01] 20[06].*content-length: \d{6}", re.IGNORECASE | re.DOTALL)


class Cutter:
    """A wire to a server that can be cut: after some bytes of an answer, or before an answer to chosen requests."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.cut_after: list[int] = []  # bytes of a body that pass, one entry for each body to be cut
        self.lose_answer_to: re.Pattern[bytes] | None = None  # of one request
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._wire, args=(client,), daemon=True).start()

    def _wire(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._target) as server:
            lost = threading.Event()
            threading.Thread(target=self._requests, args=(client, server, lost), daemon=True).start()
            with suppress(OSError):
                while answer := server.recv(65536):
                    if lost.is_set():
                        return self._cut(client)
                    if self.cut_after and _BODY_FOLLOWS.match(answer):
                        while b"\r\n\r\n" not in answer:
                            answer += server.recv(65536)
                        self._pass(server, client, answer, self.cut_after.pop(0))
                        return self._cut(client)
                    client.sendall(answer)

    def _pass(self, server: socket.socket, client: socket.socket, answer: bytes, num_bytes: int) -> None:
        """The headers and some bytes of the body."""
        num_bytes += answer.index(b"\r\n\r\n") + 4
        while num_bytes > 0 and answer:
            client.sendall(answer[:num_bytes])
            num_bytes -= len(answer[:num_bytes])
            answer = server.recv(65536)

    def _cut(self, client: socket.socket) -> None:
        self.cuts += 1
        client.shutdown(socket.SHUT_RDWR)

    def _requests(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while request := client.recv(65536):
                if self.lose_answer_to and self.lose_answer_to.match(request):
                    self.lose_answer_to = None
                    lost.set()
                server.sendall(request)
            server.shutdown(socket.SHUT_WR)


@pytest.fixture
def cutter(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cutter]:
    """A wire to either server, which this process uses from now on."""
    wire = Cutter(int(s3.endpoint.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", wire.endpoint)
    forget_client()
    yield wire
    wire.close()


@pytest.fixture
def root(s3: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    return s3.fresh_root(monkeypatch)


def test_a_stream_goes_on_where_its_connection_broke(root: str, cutter: Cutter) -> None:
    store = open_store(root)
    store.write("shard.tar", _CONTENT)
    for read in (store.read, lambda path: store.open(path).read(), lambda path: b"".join(store.open(path))):
        cutter.cut_after, cuts = [100_000, 1_300_000, 200_000], cutter.cuts
        assert read("shard.tar") == _CONTENT
        assert cutter.cuts == cuts + 3


def test_a_file_replaced_while_it_is_read_is_not_mixed(root: str, cutter: Cutter) -> None:
    store = open_store(root)
    store.write("shard.tar", _CONTENT)
    cutter.cut_after = [1_500_000]
    with store.open("shard.tar") as stream:
        assert stream.read(10) == _CONTENT[:10]
        store.write("shard.tar", _CONTENT[::-1])
        with pytest.raises(StoreError, match="was replaced while it was read; read it again"):
            stream.read()


def test_a_wire_that_always_breaks_is_given_up(root: str, cutter: Cutter) -> None:
    store = open_store(root)
    store.write("shard.tar", _CONTENT)
    with store.open("shard.tar") as stream:
        stream.seek(2 * MB)
        cutter.cut_after = [0] * 100  # headers and nothing else
        with pytest.raises(StoreError, match=r"broke off 8 times at byte 2097152; look at the store's log"):
            stream.read()


@pytest.mark.parametrize("request_line", [rb"PUT [^ ]+ HTTP", rb"PUT [^ ]+partNumber=1", rb"POST [^ ]+uploadId="])
def test_an_answer_that_is_lost_is_asked_for_again(root: str, cutter: Cutter, request_line: bytes) -> None:
    store = open_store(root)
    small = request_line.startswith(rb"PUT [^ ]+ H")
    content = _CONTENT if small else _CONTENT * 3
    cutter.lose_answer_to = re.compile(request_line)
    store.write("shard.tar", content)
    assert cutter.cuts == 1 and cutter.lose_answer_to is None
    assert store.read("shard.tar") == content and store.list("") == ["shard.tar"]


def test_an_upload_that_fails_is_taken_back(s3: Any, root: str) -> None:
    store = open_store(root)
    with pytest.raises(KeyError), store.create("shard.tar") as stream:
        stream.write(bytes(9 * MB))
        assert [upload["Key"].rpartition("/")[2] for upload in _uploads(root)] == ["shard.tar"]
        raise KeyError
    assert _uploads(root) == []


def _uploads(root: str) -> list[dict[str, Any]]:
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    found = make_client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    return [upload for upload in found if upload["Key"].startswith(prefix)]


def test_a_forked_process_has_a_connection_of_its_own(root: str) -> None:
    store = open_store(root)
    store.write("before", b"1")
    mine = s3_client.process_client()
    child = os.fork()
    if child == 0:
        code = 1
        with suppress(BaseException):
            store.write("child", store.read("before"))
            code = 0 if s3_client.process_client() is not mine else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.read("child") == b"1" and s3_client.process_client() is mine


def test_a_store_may_be_away_for_a_while(mortal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(mortal.fresh_root(monkeypatch))
    store.write("x", b"kept")
    mortal.kill()
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(store.read("x")))
    reader.start()
    assert not found
    mortal.start()
    reader.join(180)
    assert found == [b"kept"]


def test_an_upload_that_the_store_forgot_is_said_so(mortal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(mortal.fresh_root(monkeypatch))
    store.write("kept", b"")  # this server forgets an empty bucket too
    with pytest.raises(StoreError, match=r"x\.tar: the store lost what was uploaded of it so far; run again"):
        with store.create("x.tar") as stream:
            stream.write(bytes(9 * MB))
            mortal.kill()
            mortal.start()
            stream.write(bytes(9 * MB))
    assert store.list("") == ["kept"]


def test_a_store_that_does_not_answer_is_named_with_the_next_step(monkeypatch: pytest.MonkeyPatch, s3: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free.getsockname()[1]}")
        forget_client()
        with pytest.raises(StoreError, match=r"s3://some-bucket/x: no answer for \d+ s .*AWS_ENDPOINT_URL_S3"):
            open_store("s3://some-bucket/x").check()


def test_a_missing_bucket_is_named_with_the_next_step(s3: Any) -> None:
    store = open_store("s3://no-such-bucket/x")
    attempts: list[Callable[[], object]] = [
        store.check,
        lambda: store.write("a", b""),
        lambda: store.read("a"),
        lambda: store.list(""),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError, match=r"there is no bucket 'no-such-bucket'; create it"):
            attempt()


def test_missing_credentials_are_named_with_the_next_step(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_client()
    for attempt in (open_store(root).check, lambda: open_store(root).exists("a")):
        with pytest.raises(StoreError, match=r"no credentials .*AWS_ACCESS_KEY_ID.*on every node"):
            attempt()


@pytest.mark.parametrize("root", ["s3://", "s3:///prefix", "s3://a b/c", "s3://ab"])
def test_a_root_without_a_bucket_is_refused(root: str) -> None:
    with pytest.raises(StoreError, match="is not s3://bucket/prefix"):
        open_store(root)


def test_other_schemes_are_refused_with_what_is_served() -> None:
    with pytest.raises(StoreError, match=r"gs:// is not served; .*s3://"):
        open_store("gs://bucket/x")


@pytest.mark.parametrize(
    ("code", "status", "kind", "words"),
    [
        ("AccessDenied", 403, StoreError, "not allowed .*PutObject.*ListBucket on 'bucket'"),
        ("SignatureDoesNotMatch", 403, StoreError, "the credentials are refused"),
        ("XMinioStorageFull", 507, StoreFullError, "no room for s3://bucket/key"),
        ("QuotaExceeded", 403, StoreFullError, "free some there"),
        ("SlowDown", 503, StoreError, "no answer for 0 s"),
        ("NotImplemented", 501, StoreError, "NotImplemented"),
        ("NoSuchKey", 404, FileNotFoundError, "s3://bucket/key"),
    ],
)
def test_errors_say_what_to_do(code: str, status: int, kind: type[Exception], words: str) -> None:
    from botocore.exceptions import ClientError

    def fail() -> None:
        raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Put")  # pyright: ignore[reportArgumentType]

    with pytest.raises(kind, match=words) as caught:
        ask("s3://bucket/key", fail, patience_s=0)
    assert type(caught.value) is kind


def test_a_full_store_is_said_with_the_size_of_what_it_has_no_room_for() -> None:
    from botocore.exceptions import ClientError

    class Full:
        def put_object(self, **request: object) -> None:
            raise ClientError({"Error": {"Code": "QuotaExceeded"}}, "PutObject")  # pyright: ignore[reportArgumentType]

    writer = ObjectWriter("s3://bucket/shard.tar", Full, "bucket", "shard.tar")
    writer.write(bytes(12_345))
    with pytest.raises(StoreFullError, match=r"no room for s3://bucket/shard\.tar .*at least 12,345 bytes"):
        writer.publish()
