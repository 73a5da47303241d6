"""A run that is ended by the UI's button: its Ray work stops, and what it had begun can be begun again."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dagster as dg
import psutil
import pytest
from dagster import DagsterRunStatus
from dagster_graphql import DagsterGraphQLClient

from fourmill.core.store import open_store
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.source import build_source_index
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.workspace import Workspace
from fourmill.pseudolabel.config import DptConfig

DEADLINE_S = 300
ServeUi = Callable[[Path], AbstractContextManager[int]]


class Silence(BaseHTTPRequestHandler):
    """Takes requests and never answers; says when somebody waits, and when nobody does any more."""

    asked, left = threading.Event(), threading.Event()

    def do_GET(self) -> None:
        self.asked.set()
        self.connection.settimeout(DEADLINE_S)
        if not self.connection.recv(1):
            self.left.set()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silence)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def wait_until(client: DagsterGraphQLClient, run_id: str, *ends: DagsterRunStatus) -> DagsterRunStatus:
    """The run's status, once it is one of these."""
    deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while (status := client.get_run_status(run_id)) not in ends and time.monotonic() < deadline:
        pause.wait(0.2)
    return status


@pytest.mark.servers
@pytest.mark.ray
def test_ending_a_run_in_the_ui_ends_its_actors(silent_server: str, serve_ui: ServeUi, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out")
    rows = "".join(f"http://{silent_server}/{row}.jpg\tcaption {row}\n" for row in range(20))
    (tmp_path / "list.tsv").write_text(rows)
    base = smallest(workspace.out)
    source = base.source.model_copy(update={"list": str(tmp_path / "list.tsv")})
    ingest = IngestConfig(allow_hosts=("127.0.0.1",), first_byte_timeout_s=3600, total_timeout_s=3600)
    project = base.model_copy(update={"source": source, "ingest": ingest})
    workspace.keep(project)
    build_source_index(open_store(project.store), project.dataset, project.source, project.layout)
    with serve_ui(workspace.out) as port:
        client = DagsterGraphQLClient("127.0.0.1", port_number=port)
        run_id = client.submit_job_execution("label_block", tags={"dagster/partition": "block_00"})
        assert Silence.asked.wait(DEADLINE_S), client.get_run_status(run_id)
        client.terminate_run(run_id)  # what the button sends
        assert Silence.left.wait(DEADLINE_S)
        assert wait_until(client, run_id, DagsterRunStatus.CANCELED) == DagsterRunStatus.CANCELED
    assert not [path for path in tmp_path.rglob("*.tar*") if "images" in str(path)]


@pytest.mark.servers
@pytest.mark.ray
def test_ending_a_run_in_the_ui_ends_a_labeller_amid_a_shard(
    smallest_demo: Path, serve_ui: ServeUi, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path / "out")
    shutil.copytree(smallest_demo, workspace.out)
    project = workspace.project()
    seeded = DptConfig(weights="seeded:0", batch_size=1)
    workspace.keep(project.model_copy(update={"labellers": {**project.labellers, "depth": seeded}}))
    folder = Path(project.store) / project.dataset
    before = set(folder.glob("*/depth/*.tar"))
    with serve_ui(workspace.out) as port:
        client = DagsterGraphQLClient("127.0.0.1", port_number=port)
        run_id = client.submit_job_execution(
            "label_block", tags={"dagster/partition": "block_00"}, asset_selection=[dg.AssetKey(["labels", "depth"])]
        )
        labeller = holder_of_a_draft(folder, lambda: client.get_run_status(run_id) != DagsterRunStatus.FAILURE)
        labeller.suspend()  # else it might be done before the run is ended
        client.terminate_run(run_id)
        assert wait_until(client, run_id, DagsterRunStatus.CANCELED) == DagsterRunStatus.CANCELED
        assert labeller.wait(DEADLINE_S) is None
    assert not list(folder.glob("*/depth/.*.tmp"))
    assert set(folder.glob("*/depth/*.tar")) <= before


def holder_of_a_draft(folder: Path, goes_on: Callable[[], bool]) -> psutil.Process:
    """The process that writes a tar of depth labels, once there is one."""
    deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not (drafts := list(folder.glob("*/depth/.*.tar.*.tmp"))) and time.monotonic() < deadline and goes_on():
        pause.wait(0.01)
    return psutil.Process(int(drafts[0].name.split(".tar.")[1].split(".")[0]))
