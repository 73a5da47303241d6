"""Runs that have not ended are known by what they make, waited for, and marked failed where they were killed."""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test  # a run as the UI's launcher makes it
from rich.console import Console
from typer.testing import CliRunner

from fourmill.pipelines import launcher
from fourmill.pipelines.cli import app
from fourmill.pipelines.launcher import WatchedRunLauncher, is_lost
from fourmill.pipelines.open_runs import close_killed, open_runs, wait_for_others
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.runner import open_instance
from fourmill.pipelines.ui_cli import _say_what_goes_on
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.run_process import process_tags

IMAGES, DEPTH = dg.AssetKey(["cc12m", "images"]), dg.AssetKey(["labels", "depth"])
BLOCKS = dg.StaticPartitionsDefinition(["block_00", "block_01"])
Worker = Callable[[], "subprocess.Popen[bytes]"]
Started = dg.DagsterRunStatus.STARTED


@pytest.fixture
def worker() -> Iterator[Worker]:
    """Starts processes that live until they are killed."""
    with ExitStack() as stack:

        def start() -> "subprocess.Popen[bytes]":
            process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield start


def jobs() -> dg.RepositoryDefinition:
    @dg.asset(key=IMAGES, partitions_def=BLOCKS)
    def images() -> None: ...

    @dg.asset(key=DEPTH, deps=[images], partitions_def=BLOCKS)
    def depth() -> None: ...

    return dg.Definitions(assets=[images, depth], jobs=[dg.define_asset_job("label_block", "*")]).get_repository_def()


def run_of(
    instance: dg.DagsterInstance,
    process: "subprocess.Popen[bytes]",
    keys: set[dg.AssetKey] | None,
    status: dg.DagsterRunStatus = Started,
) -> dg.DagsterRun:
    run_id, selection = str(uuid4()), frozenset(keys) if keys else None
    tags = {**process_tags(run_id, process.pid), "dagster/partition": "block_00"}
    return create_run_for_test(
        instance, job_name="label_block", run_id=run_id, status=status, tags=tags, asset_selection=selection
    )


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def test_a_run_makes_what_it_was_asked_for_or_all_of_its_job(worker: Worker) -> None:
    process = worker()
    with dg.DagsterInstance.ephemeral() as instance:
        run_of(instance, process, None)
        run_of(instance, process, {DEPTH}, dg.DagsterRunStatus.NOT_STARTED)
        run_of(instance, process, {DEPTH}, dg.DagsterRunStatus.SUCCESS)
        part, whole = open_runs(instance, jobs())
        create_run_for_test(instance, job_name="of_an_older_project", status=Started)
        assert open_runs(instance, jobs())[0].keys == frozenset()
        chosen = create_run_for_test(
            instance, job_name="__ASSET_JOB", status=Started, asset_selection=frozenset({DEPTH, IMAGES})
        )
        assert open_runs(instance, jobs())[0].name == f"run {chosen.run_id[:8]} (cc12m/images, labels/depth)"
    assert (whole.state, part.state) == ("running", "queued")
    assert whole.makes((IMAGES, "block_00")) and whole.makes((DEPTH, "block_00"))
    assert part.makes((DEPTH, "block_00")) and not part.makes((IMAGES, "block_00"))
    assert not whole.makes((IMAGES, "block_01"))
    assert whole.name == f"run {whole.run_id[:8]} (label_block block_00)"


def test_killed_runs_are_marked_failed_and_no_others(worker: Worker) -> None:
    alive, dead = worker(), worker()
    with dg.DagsterInstance.ephemeral() as instance:
        going, gone = run_of(instance, alive, None), run_of(instance, dead, None)
        again = create_run_for_test(instance, job_name="label_block", status=Started, tags=gone.tags)
        kill(dead)
        assert {one.run_id: one.state for one in open_runs(instance, jobs())}[gone.run_id] == "killed"
        assert close_killed(instance) == 1 and close_killed(instance) == 0
        found = {run.run_id: run.status for run in instance.get_runs()}
    assert found == {going.run_id: Started, again.run_id: Started, gone.run_id: dg.DagsterRunStatus.FAILURE}


def test_a_run_that_makes_the_same_is_waited_for_until_it_ends_or_is_killed(worker: Worker) -> None:
    first, other, told, pauses = worker(), worker(), list[str](), list[float]()
    with dg.DagsterInstance.ephemeral() as instance:
        same, _ = run_of(instance, first, {DEPTH}), run_of(instance, other, {IMAGES})

        def tell(text: str) -> None:
            told.append(text)
            kill(first)

        assert wait_for_others(instance, jobs(), {(DEPTH, "block_00")}, tell, pauses.append)
        assert not wait_for_others(instance, jobs(), {(DEPTH, "block_00"), (IMAGES, "block_01")}, tell, pauses.append)
    assert len(pauses) == 1
    assert told == [
        f"run {same.run_id[:8]} (label_block block_00) is making the same; "
        "waiting until it ends (it can be ended in `fourmill ui`)"
    ]


def test_a_run_that_has_not_begun_is_not_waited_for(worker: Worker) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run_of(instance, worker(), {DEPTH}, dg.DagsterRunStatus.NOT_STARTED)
        assert not wait_for_others(instance, jobs(), {(DEPTH, "block_00")}, lambda text: None)


def test_who_is_alone_knows_that_runs_of_other_commands_are_dead(worker: Worker) -> None:
    """As after a container that was replaced: its name and its process ids are others."""
    with dg.DagsterInstance.ephemeral() as instance:
        of_launcher = create_run_for_test(
            instance, job_name="label_block", status=Started, tags={".dagster/grpc_info": '{"host": "localhost"}'}
        )
        living = run_of(instance, worker(), None)
        elsewhere, unmarked = run_of(instance, worker(), None), create_run_for_test(instance, status=Started)
        (tag,) = process_tags(elsewhere.run_id)
        _, _, *others = elsewhere.tags[tag].split(" ")
        instance.add_run_tags(elsewhere.run_id, {tag: " ".join([elsewhere.run_id, "another-host", *others])})
        assert close_killed(instance) == 0
        assert close_killed(instance, alone=True) == 2
        failed = {run.run_id for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE]))}
    assert failed == {elsewhere.run_id, unmarked.run_id} and {of_launcher.run_id, living.run_id}.isdisjoint(failed)


def test_a_run_that_never_says_where_it_is_is_lost_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run = create_run_for_test(instance, job_name="label_block", status=Started)
        assert not is_lost(instance, run)
        now = time.time()
        monkeypatch.setattr(launcher.time, "time", lambda: now + 700)
        assert is_lost(instance, run) and open_runs(instance, jobs())[0].state == "killed"


def watched(instance: dg.DagsterInstance) -> WatchedRunLauncher:
    made = WatchedRunLauncher()
    made.register_instance(instance)
    return made


def test_the_launcher_knows_whether_a_process_lives(worker: Worker) -> None:
    process = worker()
    with dg.DagsterInstance.ephemeral() as instance:
        run = run_of(instance, process, None)
        assert watched(instance).check_run_worker_health(run).status.value == "RUNNING"
        kill(process)
        gone = watched(instance).check_run_worker_health(run)
        assert gone.status.value == "FAILED" and "its process is gone" in str(gone.msg)
        assert watched(instance).supports_check_run_worker_health


def test_a_run_that_cannot_be_ended_from_here_goes_on_as_it_was(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    with dg.DagsterInstance.ephemeral() as instance:
        run = run_of(instance, worker(), None)
        monkeypatch.setattr(launcher.os, "kill", refuse)
        assert not watched(instance).terminate(run.run_id)
        monkeypatch.undo()
        found = instance.get_run_by_id(run.run_id)
        assert found is not None and found.status == Started


def test_a_command_that_has_not_heard_is_interrupted_again_until_its_run_ends(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops what a signal's handler raises amid a callback of its garbage collector."""
    signals: list[int] = []
    with dg.DagsterInstance.ephemeral() as instance:
        run = run_of(instance, worker(), None)

        def hear(pid: int, number: int) -> None:
            signals.append(number)
            if len(signals) == 3:
                instance.report_run_canceled(run)

        monkeypatch.setattr(launcher.os, "kill", hear)
        launcher._interrupt_again(instance, run.run_id, 0, pause=lambda seconds: None)
        monkeypatch.undo()
    assert signals == [signal.SIGINT] * 3


def test_status_and_an_ended_ui_tell_of_runs(tmp_path: Path, worker: Worker) -> None:
    workspace, dead = Workspace(tmp_path), worker()
    workspace.keep(smallest(tmp_path))
    with open_instance(workspace.home) as instance:
        going, gone = run_of(instance, worker(), None), run_of(instance, dead, {DEPTH})
        kill(dead)
        waiting = run_of(instance, worker(), {DEPTH}, dg.DagsterRunStatus.NOT_STARTED)
        shown = CliRunner().invoke(app, ["status", "--out", str(tmp_path)], env={"COLUMNS": "200"}).output
        said = io.StringIO()
        _say_what_goes_on(workspace, Console(file=said))
    assert f"run {going.run_id[:8]} (label_block block_00): running" in shown
    assert (
        f"run {gone.run_id[:8]} (label_block block_00): killed; its process was killed; the next `fourmill run`"
        in shown
    )
    (depth,) = (line for line in shown.splitlines() if "labels/depth" in line and "block_00" in line)
    assert all(f"{run.run_id[:8]} " in depth for run in (going, gone, waiting))
    assert f"run {going.run_id[:8]} (label_block block_00) goes on" in said.getvalue()
    assert f"run {waiting.run_id[:8]} (label_block block_00) waits" in said.getvalue()
    assert gone.run_id[:8] not in said.getvalue()
