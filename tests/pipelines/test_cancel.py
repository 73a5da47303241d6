"""A run that is ended by the UI's button, or by `kill -9`: its Ray work stops, and what it had begun can be begun again."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import dagster as dg
import psutil
import pytest
from dagster import DagsterRunStatus
from dagster_graphql import DagsterGraphQLClient
from typer.testing import CliRunner

from fourmill.pipelines.cli import app
from fourmill.pipelines.runner import open_instance
from fourmill.pipelines.workspace import Workspace
from fourmill.pseudolabel.config import DptConfig
from fourmill.runtime.run_process import pid_of

DEADLINE_S = 300
ServeUi = Callable[[Path], AbstractContextManager[int]]
SilentList = tuple[Workspace, threading.Event, threading.Event]


def wait_until(client: DagsterGraphQLClient, run_id: str, *ends: DagsterRunStatus) -> DagsterRunStatus:
    """The run's status, once it is one of these."""
    deadline, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while (status := client.get_run_status(run_id)) not in ends and time.monotonic() < deadline:
        pause.wait(0.2)
    return status


@pytest.mark.servers
@pytest.mark.ray
def test_ending_a_run_in_the_ui_ends_its_actors(silent_list: SilentList, serve_ui: ServeUi) -> None:
    workspace, asked, left = silent_list
    with serve_ui(workspace.out) as port:
        client = DagsterGraphQLClient("127.0.0.1", port_number=port)
        run_id = client.submit_job_execution("label_block", tags={"dagster/partition": "block_00"})
        assert asked.wait(DEADLINE_S), client.get_run_status(run_id)
        client.terminate_run(run_id)  # what the button sends
        assert left.wait(DEADLINE_S)
        assert wait_until(client, run_id, DagsterRunStatus.CANCELED) == DagsterRunStatus.CANCELED
    assert not [path for path in workspace.out.rglob("*.tar*") if "images" in str(path)]


@pytest.mark.servers
@pytest.mark.ray
def test_a_run_whose_process_is_killed_fails_by_itself_and_holds_nobody_up(
    silent_list: SilentList, serve_ui: ServeUi
) -> None:
    workspace, asked, left = silent_list
    with serve_ui(workspace.out) as port:
        client = DagsterGraphQLClient("127.0.0.1", port_number=port)
        run_id = client.submit_job_execution("label_block", tags={"dagster/partition": "block_00"})
        assert asked.wait(DEADLINE_S), client.get_run_status(run_id)
        assert runs_at("images", workspace) == [{"id": run_id, "state": "running"}]
        with dg.DagsterInstance.get() as instance:
            run = instance.get_run_by_id(run_id)
        assert run is not None
        psutil.Process(pid_of(run_id, run.tags)).kill()
        assert runs_at("images", workspace) in ([{"id": run_id, "state": "killed"}], [])
        assert left.wait(DEADLINE_S)
        assert wait_until(client, run_id, DagsterRunStatus.FAILURE) == DagsterRunStatus.FAILURE
    assert runs_at("images", workspace) == []


@pytest.mark.ray
def test_a_run_of_the_command_line_can_be_ended_from_the_ui_too(silent_list: SilentList) -> None:
    workspace, asked, left = silent_list
    command = [sys.executable, "-m", "fourmill.pipelines.cli", "run", "--out", str(workspace.out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with open_instance(workspace.home) as instance:
            assert asked.wait(DEADLINE_S), process.poll()
            (run,) = instance.get_runs(dg.RunsFilter(statuses=[DagsterRunStatus.STARTED]))
            assert instance.run_launcher.terminate(run.run_id)  # what the button asks for
            _, said = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 1 and "ended by a signal; the same command goes on" in said
            assert left.wait(DEADLINE_S)
            ended = instance.get_run_by_id(run.run_id)
            assert ended is not None and ended.status == DagsterRunStatus.CANCELED
            assert not instance.run_launcher.terminate(run.run_id)
    finally:
        process.kill()
        process.wait()


def runs_at(asset: str, workspace: Workspace) -> object:
    """What `fourmill status` says of the runs that are at the first block of an asset."""
    done = CliRunner().invoke(app, ["status", "--out", str(workspace.out), "--json"], catch_exceptions=False)
    rows = {(row["asset"], row["block"]): row["runs"] for row in json.loads(done.output)}
    return rows[f"cc12m/{asset}", "block_00"]


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
