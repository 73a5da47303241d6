"""A web server on loopback that does what a test tells it."""

import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
