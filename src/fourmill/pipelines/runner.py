"""Materialize whatever a project lacks, in this process: what `fourmill demo` and `fourmill run` do.

Each step is one Dagster run (a block, or a group of unpartitioned assets), recorded in the project's instance, so the
UI shows the same history. State is read again before each run, so nothing is done twice and a killed run is resumed.
"""

import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import dagster as dg

from fourmill.pipelines.findings import blocks_with_copies, spoken, warnings_of
from fourmill.pipelines.open_runs import wait_for_others
from fourmill.pipelines.outside import changed_outside
from fourmill.pipelines.status import Node, Place, read_status
from fourmill.runtime.launch import warm_up
from fourmill.runtime.project import DatasetConfig, Project
from fourmill.runtime.ray_session import stop_ray
from fourmill.runtime.run_process import process_tags
from fourmill.runtime.session import Session

_CHECK_FAILED = "DagsterAssetCheckFailedError"  # which Dagster does not export
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class RunFailedError(RuntimeError):
    """A run that failed, with the first error that a person can act on."""


def open_instance(home: Path) -> dg.DagsterInstance:
    """The project's Dagster instance; its folder and dagster.yaml are made when missing."""
    home.mkdir(parents=True, exist_ok=True)
    config, text = home / "dagster.yaml", (Path(__file__).parent / "dagster.yaml").read_text()
    if not config.is_file() or config.read_text() != text:  # a project that cannot be written can be read
        config.write_text(text)
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["DAGSTER_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("dagster").setLevel(logging.ERROR)
    return dg.DagsterInstance.get()


def materialize_all(
    defs: dg.Definitions,
    project: Project,
    instance: dg.DagsterInstance,
    announce: Callable[[str, list[Node]], None] = lambda job, nodes: None,
    retry_failed: bool = False,
    warn: Callable[[str], None] = lambda warning: None,
) -> int:
    """Bring every asset of the project up to date; return the number of runs that were needed.

    What a run of the UI is making is waited for, and then looked at again.

    Args:
        retry_failed: ask again for images whose failure may have passed; blocks that gain none stay as they are.
        warn: is told of checks that failed without blocking, and of runs that are waited for.

    Raises:
        RunFailedError: a run failed; what was finished before stays finished.
    """
    store = Session(project).store
    outside = changed_outside(project, store)
    asked = (
        _failed_images(project) if retry_failed else {}
    )  # of blocks that are as they should be, to be made nevertheless
    jobs = defs.get_repository_def()
    runs = 0
    cleared: set[Place] = set()  # of copies, once a block: two that name each other would never end
    steps = deque(_steps(project))
    while steps:
        job_name, partition = steps.popleft()
        job = defs.resolve_job_def(job_name)
        wanted = [
            node
            for node in read_status(defs.resolve_asset_graph(), instance, store, outside | asked)
            if node.state != "ok" and node.partition == partition and node.key in job.asset_layer.executable_asset_keys
        ]
        if wanted and wait_for_others(instance, jobs, {(node.key, node.partition) for node in wanted}, warn):
            outside = changed_outside(project, store)
            steps.appendleft((job_name, partition))
        elif wanted:
            if runs == 0:
                warm_up()  # most of what follows is training, and the libraries take a quarter of a minute to load
            if job_name == "train_4m":
                stop_ray()  # all shards are made; its processes would take memory and a share of every core
            announce(job_name, wanted)
            result = _execute(job, [n.key for n in wanted], partition, instance, retry_failed)
            runs += 1
            for node in wanted:
                outside.pop((node.key, node.partition), None)
                asked.pop((node.key, node.partition), None)
            for warning in warnings_of(result):
                warn(f"{partition or job_name}: {warning}")
            again = {place: why for place, why in blocks_with_copies(result).items() if place not in cleared}
            cleared |= again.keys()
            asked |= again
            steps.extendleft((job_name, block) for _, block in again if (job_name, block) not in steps)
    return runs


def _failed_images(project: Project) -> dict[Place, str]:
    return {
        (dg.AssetKey([dataset.name, "images"]), block): "failed downloads are tried again"
        for dataset in project.datasets()
        for block in dataset.layout.block_keys()
    }


def _steps(project: Project) -> list[tuple[str, str | None]]:
    blocks = project.layout.block_keys()
    return [
        ("index_list", None),
        *(step for dataset in project.more_datasets for step in _ingest_steps(dataset)),
        *((f"label_{name}", block) for name, named in project.train_blocks_beside().items() for block in named),
        *(("label_block", block) for block in blocks),
        ("train_tokenizers", None),
        *(("tokenize_block", block) for block in blocks),
        ("train_4m", None),
    ]


def _ingest_steps(dataset: DatasetConfig) -> list[tuple[str, str | None]]:
    ingest = f"ingest_{dataset.name}"
    return [(f"index_{dataset.name}", None), *((ingest, block) for block in dataset.layout.block_keys())]


def _execute(
    job: dg.JobDefinition,
    keys: list[dg.AssetKey],
    partition: str | None,
    instance: dg.DagsterInstance,
    retry_failed: bool,
) -> dg.ExecuteInProcessResult:
    images = [key for key in keys if retry_failed and key.path[-1] == "images"]
    ops = {key.to_python_identifier(): {"config": {"retry_failed": True}} for key in images}
    run_id = str(uuid4())
    result = job.execute_in_process(
        run_config={**_QUIET, "ops": ops},
        instance=instance,
        partition_key=partition,
        asset_selection=keys,
        raise_on_error=False,
        run_id=run_id,
        tags=process_tags(run_id),
    )
    if not result.success:
        raise RunFailedError(first_error(result, job.name, partition))
    return result


def _failed_checks(result: dg.ExecuteInProcessResult, step: str | None) -> str:
    """The blocking checks of a step that failed, with what they found."""
    said: list[str] = []
    for event in result.all_events:
        if event.step_key == step and event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            one = event.asset_check_evaluation_data
            if not one.passed and one.severity == dg.AssetCheckSeverity.ERROR:
                found = spoken(one.metadata)
                said.append(
                    f"{one.asset_key.to_user_string()} fails its check {one.check_name}"
                    + (f" ({found})" if found else "")
                )
    return (
        "; ".join(said)
        + ". What is made of it waits; the asset's page in `fourmill ui` has the check's description, figures and pictures"
    )


def first_error(result: dg.ExecuteInProcessResult, job: str, partition: str | None) -> str:
    """The first step that failed, and why, in one message."""
    where = f"{job} {partition or ''}".strip()
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            # Dagster wraps what an asset raises; what that was caused by in turn is already in its words.
            while error is not None and error.cause is not None and str(error.cls_name).startswith("Dagster"):
                error = error.cause
            if error is not None and error.cls_name == dg.DagsterExecutionInterruptedError.__name__:
                return f"{where}, {event.step_key}: ended by a signal; the same command goes on with what is left"
            if error is not None and error.cls_name == _CHECK_FAILED:
                return f"{where}, {event.step_key}: {_failed_checks(result, event.step_key)}"
            message = error.message.strip() if error else event.message
            return f"{where}, {event.step_key}: {message}"
    return f"{where} failed; see the run {result.run_id} in `make ui`"
