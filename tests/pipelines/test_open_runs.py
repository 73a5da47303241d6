"""Runs that have not ended are known by what they make, waited for, and marked failed where they were killed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from uuid import uuid4

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test  # a run as the UI's launcher makes it

from fourmill.pipelines.launcher import WatchedRunLauncher
from fourmill.pipelines.open_runs import close_killed, open_runs, wait_for_others
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


def definitions() -> dg.Definitions:
    @dg.asset(key=IMAGES, partitions_def=BLOCKS)
    def images() -> None: ...

    @dg.asset(key=DEPTH, deps=[images], partitions_def=BLOCKS)
    def depth() -> None: ...

    return dg.Definitions(assets=[images, depth], jobs=[dg.define_asset_job("label_block", "*")])


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
    process, defs = worker(), definitions()
    with dg.DagsterInstance.ephemeral() as instance:
        run_of(instance, process, None)
        run_of(instance, process, {DEPTH}, dg.DagsterRunStatus.STARTING)
        run_of(instance, process, {DEPTH}, dg.DagsterRunStatus.SUCCESS)
        part, whole = open_runs(instance, defs)
        create_run_for_test(instance, job_name="of_an_older_project", status=Started)
        assert open_runs(instance, defs)[0].keys == frozenset()
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
        assert {one.run_id: one.state for one in open_runs(instance, definitions())}[gone.run_id] == "killed"
        assert close_killed(instance) == 1 and close_killed(instance) == 0
        found = {run.run_id: run.status for run in instance.get_runs()}
    assert found == {going.run_id: Started, again.run_id: Started, gone.run_id: dg.DagsterRunStatus.FAILURE}


def test_a_run_that_makes_the_same_is_waited_for_until_it_ends_or_is_killed(worker: Worker) -> None:
    first, other, told = worker(), worker(), list[str]()
    with dg.DagsterInstance.ephemeral() as instance:
        same, _ = run_of(instance, first, {DEPTH}), run_of(instance, other, {IMAGES})

        def tell(text: str) -> None:
            told.append(text)
            kill(first)

        assert wait_for_others(instance, definitions(), {(DEPTH, "block_00")}, tell)
        assert not wait_for_others(instance, definitions(), {(DEPTH, "block_00"), (IMAGES, "block_01")}, tell)
    assert told == [
        f"run {same.run_id[:8]} (label_block block_00) is making the same; "
        "waiting until it ends (it can be ended in `fourmill ui`)"
    ]


def test_a_run_that_has_not_begun_is_not_waited_for(worker: Worker) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        run_of(instance, worker(), {DEPTH}, dg.DagsterRunStatus.STARTING)
        assert not wait_for_others(instance, definitions(), {(DEPTH, "block_00")}, lambda text: None)


def test_the_launcher_knows_whether_a_process_lives(worker: Worker) -> None:
    launcher, process = WatchedRunLauncher(), worker()
    with dg.DagsterInstance.ephemeral() as instance:
        run = run_of(instance, process, None)
    alive = launcher.check_run_worker_health(run).status.value
    kill(process)
    gone = launcher.check_run_worker_health(run)
    assert (alive, gone.status.value) == ("RUNNING", "FAILED") and "its process is gone" in str(gone.msg)
    assert launcher.supports_check_run_worker_health
