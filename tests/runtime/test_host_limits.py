"""The limit per host over several processes: real Ray actors, a real server that counts who is there at once."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest
import uvloop
from PIL import Image

from fourmill.core.names import Layout
from fourmill.core.store import LocalStore
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.leased_hosts import LeasedHostLimits
from fourmill.ingest.source import build_source_index
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.host_limits import cluster_host_limits, keeper
from fourmill.runtime.project import write_project

DATA = Path(__file__).parents[1] / "data"


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

    @property
    def port(self) -> int:
        return self.server_address[1]

    def hold(self) -> None:
        """Wait until a request may be answered."""
        self.gate.wait(180)

    def body(self, path: str) -> bytes:
        """What is at a path."""
        return b"x"

    def met(self, port: int) -> None:
        """A client asks from a port."""

    def wait_for_busy(self, number: int) -> None:
        with self.change:
            assert self.change.wait_for(lambda: self.busy >= number, 180)


class _Handler(BaseHTTPRequestHandler):
    server: Counting  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/all-here":
            server.gate.set()
            with server.change:
                server.change.notify_all()
            self.wfile.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            return
        server.met(self.client_address[1])
        with server.change:
            server.busy += 1
            server.most = max(server.most, server.busy)
            server.change.notify_all()
        try:
            server.hold()
        finally:
            with server.change:  # before the answer, after which the client may send the next one
                server.busy -= 1
                server.served += 1
        body = server.body(self.path)
        self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Crowded(Counting):
    """Pictures, each of which waits for others to be asked for beside it.

    Nothing is answered before `gate`, unless more than `limit` requests are there: then it is proven that nobody holds them
    back. After that a request waits for another one to be there too, as long as there are others to come.
    """

    def __init__(self, num_rows: int, limit: int) -> None:
        self.num_rows, self.limit = num_rows, limit
        self.pid_of: dict[int, int] = {}  # port that a client asks from -> its process
        super().__init__()

    def hold(self) -> None:
        with self.change:
            assert self.change.wait_for(self._may_answer, 180)

    def _may_answer(self) -> bool:
        if not self.gate.is_set():
            return self.most > self.limit
        return self.busy >= 2 or self.busy + self.served == self.num_rows

    def body(self, path: str) -> bytes:
        pixels = np.random.default_rng(int(path[1:])).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "JPEG")
        return sink.getvalue()

    def met(self, port: int) -> None:
        if port not in self.pid_of:
            here = [one for one in psutil.net_connections("tcp4") if one.raddr and one.raddr[1] == self.port]
            self.pid_of |= {one.laddr[1]: one.pid for one in here if one.pid and one.laddr}


@contextmanager
def serving(server: Counting | None = None) -> Iterator[tuple[Counting, dict[str, str]]]:
    with server or Counting() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server, {"one.test:80": f"127.0.0.1:{server.port}"}
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def worker(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes an actor that downloads; its module is on the actors' path, see `ray_session`."""
    import ray

    monkeypatch.syspath_prepend(str(DATA))
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


@pytest.mark.ray
def test_workers_of_two_nodes_that_make_a_block_together_keep_to_the_limit_of_a_host(tmp_path: Path) -> None:
    """The second block's workers each keep a limit of their own, and are seen to exceed it together."""
    layout = Layout(rows_per_shard=12, shards_per_block=4, num_blocks=2)
    num = layout.num_rows // 2
    hosts = ["one.test"] * num + ["two.test"] * num
    (tmp_path / "list.tsv").write_text("".join(f"http://{host}/{row}\tc\n" for row, host in enumerate(hosts)))
    base = smallest(tmp_path)
    source = base.source.model_copy(update={"list": str(tmp_path / "list.tsv"), "val_fraction": 0.3})
    patient = IngestConfig(per_host=2, retries=0, total_timeout_s=600, first_byte_timeout_s=600)
    project = base.model_copy(update={"layout": layout, "source": source, "ingest": patient})
    build_source_index(LocalStore(project.store), project.dataset, source, layout)
    write_project(project, tmp_path / "project.json")
    together, alone = Crowded(num, 2), Crowded(num, 2)
    with serving(together), serving(alone):
        routes = {"one.test:80": f"127.0.0.1:{together.port}", "two.test:80": f"127.0.0.1:{alone.port}"}
        (tmp_path / "routes.json").write_text(json.dumps(routes))
        command = [sys.executable, str(DATA / "two_nodes_driver.py"), str(tmp_path / "project.json")]
        command += [str(tmp_path / "routes.json"), "one.test", str(together.port)]
        environment = {**os.environ, "PYTHONPATH": str(DATA)}  # for `images_alone`, in the actors
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    done = json.loads(ran.stdout.splitlines()[-1])
    assert done["counts"] == [{"ok": num}, {"ok": num}]
    assert (together.most, together.served) == (2, num) and alone.most > 2
    node_of = {int(pid): node for pid, node in done["node_of"].items()}
    took_part = set(together.pid_of.values()) & set(node_of)  # the keeper was there too, to say that all are
    assert len(took_part) == 4 and len({node_of[pid] for pid in took_part}) == 2


def test_outside_ray_there_is_no_cluster_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert cluster_host_limits(2, 4) is None


@pytest.mark.ray
def test_leases_given_back_after_the_end_of_ray_start_no_other(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    async def late() -> None:
        limits = cluster_host_limits(2, 4)
        assert isinstance(limits, LeasedHostLimits)
        await limits.acquire("example.org")
        limits.release("example.org")
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "remote", lambda *_: pytest.fail("Ray was asked"))
        with pytest.raises(ConnectionError, match="has ended"):
            await limits._sync("worker", 2, {})
        await limits.close()

    uvloop.run(late())
