"""The limit per host over several processes: real Ray actors, a real server that counts who is there at once."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from fourmill.runtime.host_limits import cluster_host_limits, keeper


class Counting(ThreadingHTTPServer):
    """Answers each request when it is let go, or at once; knows the most that were there together."""

    daemon_threads = True

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.num_waiting = 0
        self.busy = 0
        self.most = 0
        self.served = 0
        self.change = threading.Condition()
        super().__init__(("127.0.0.1", 0), _Handler)

    def wait_for_busy(self, number: int) -> None:
        with self.change:
            assert self.change.wait_for(lambda: self.busy >= number, 180)


class _Handler(BaseHTTPRequestHandler):
    server: Counting  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        server = self.server
        with server.change:
            server.busy += 1
            server.most = max(server.most, server.busy)
            server.change.notify_all()
        try:
            server.gate.wait(180)
        finally:
            with server.change:  # before the answer, after which the client may send the next one
                server.busy -= 1
                server.served += 1
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def serving() -> Iterator[tuple[Counting, dict[str, str]]]:
    with Counting() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server, {"one.test:80": f"127.0.0.1:{server.server_address[1]}"}
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def worker(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes an actor that downloads; its module is on the actors' path, see `ray_session`."""
    import ray

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "data"))
    polite = importlib.import_module("polite_worker").PoliteWorker
    return lambda: ray.remote(polite).options(num_cpus=0).remote()


URLS = [f"http://one.test/{number}" for number in range(30)]


@pytest.mark.ray
def test_two_processes_together_keep_to_the_limit_of_a_host(worker: Callable[[], Any]) -> None:
    import ray

    with serving() as (server, connect_to):
        workers = [worker(), worker()]
        assert len(set(ray.get([one.pid.remote() for one in workers]))) == 2
        running = [one.fetch.remote(URLS, connect_to, 2) for one in workers]
        server.wait_for_busy(2)
        server.gate.set()
        assert ray.get(running, timeout=180) == [["ok"] * 30] * 2
        assert (server.most, server.served) == (2, 60)
    assert ray.get(keeper().held.remote("one.test")) == 0


@pytest.mark.ray
def test_a_killed_worker_gives_its_turns_back(worker: Callable[[], Any]) -> None:
    import ray

    with serving() as (server, connect_to):
        doomed, heir = worker(), worker()
        pid = cast(int, ray.get(doomed.pid.remote()))
        doomed.fetch.remote(URLS, connect_to, 2)
        server.wait_for_busy(2)  # both turns are with the doomed one
        running = heir.fetch.remote(URLS, connect_to, 2)
        os.kill(pid, signal.SIGKILL)
        server.gate.set()
        assert ray.get(running, timeout=180) == ["ok"] * 30
        assert server.most == 2


@pytest.mark.ray
def test_a_killed_keeper_comes_back_and_work_goes_on(worker: Callable[[], Any]) -> None:
    import ray

    with serving() as (server, connect_to):
        one = worker()
        running = one.fetch.remote(URLS, connect_to, 2)
        server.wait_for_busy(2)
        keeper_pid = cast(int, ray.get(keeper().pid.remote()))
        os.kill(keeper_pid, signal.SIGKILL)
        server.gate.set()
        assert ray.get(running, timeout=180) == ["ok"] * 30
        assert server.most == 2


def test_outside_ray_there_is_no_cluster_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert cluster_host_limits(2, 4) is None
