"""Runs that have not ended: of the UI, of schedules, of the command line; and those that were killed and cannot say so."""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import dagster as dg

from fourmill.pipelines.launcher import KILLED
from fourmill.pipelines.status import Place
from fourmill.runtime.run_process import is_killed

State = Literal["queued", "running", "killed"]
_PARTITION_TAG = "dagster/partition"
_AT_WORK = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
_OPEN = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, *_AT_WORK]
_ASK_EVERY_S = 2.0


@dataclass(frozen=True)
class OpenRun:
    """A run that has not ended; "killed" is one whose process has."""

    run_id: str
    job: str
    partition: str | None
    keys: frozenset[dg.AssetKey]
    state: State

    @property
    def name(self) -> str:
        """`run 1a2b3c4d (label_block block_00)`, with as much of its id as the UI shows."""
        return f"run {self.run_id[:8]} ({f'{self.job} {self.partition or str()}'.strip()})"

    def makes(self, place: Place) -> bool:
        """Whether an asset, or that block of it, was asked of the run."""
        key, partition = place
        return key in self.keys and partition in (None, self.partition)


def open_runs(instance: dg.DagsterInstance, defs: dg.Definitions) -> list[OpenRun]:
    """All of them, the newest first."""
    found: list[OpenRun] = []
    for run in instance.get_runs(dg.RunsFilter(statuses=_OPEN)):
        keys = frozenset(run.asset_selection or _keys_of(run.job_name, defs))
        found.append(OpenRun(run.run_id, run.job_name, run.tags.get(_PARTITION_TAG), keys, _state(run)))
    return found


def close_killed(instance: dg.DagsterInstance) -> int:
    """Mark runs failed whose process is gone (`kill -9` leaves them "started"); return how many."""
    runs = instance.get_runs(dg.RunsFilter(statuses=_OPEN))
    killed = [run for run in runs if is_killed(run.run_id, run.tags)]
    for run in killed:
        instance.report_run_failed(run, KILLED)
    return len(killed)


def wait_for_others(
    instance: dg.DagsterInstance, defs: dg.Definitions, places: Collection[Place], tell: Callable[[str], None]
) -> bool:
    """Wait until no other run makes one of these places: both would do the same work. Returns whether there was one.

    Args:
        tell: is told of each run that is waited for.
    """
    told: set[str] = set()
    while busy := [one for one in open_runs(instance, defs) if one.state == "running" and _meets(one, places)]:
        for one in busy:
            if one.run_id not in told:
                tell(f"{one.name} is making the same; waiting until it ends (it can be ended in `fourmill ui`)")
                told.add(one.run_id)
        time.sleep(_ASK_EVERY_S)
        close_killed(instance)
    return bool(told)


def _meets(run: OpenRun, places: Collection[Place]) -> bool:
    return any(run.makes(place) for place in places)


def _keys_of(job_name: str, defs: dg.Definitions) -> Iterable[dg.AssetKey]:
    """The assets of a job that was started as a whole; none of a job that the project no longer has."""
    jobs = defs.get_repository_def()
    return jobs.get_job(job_name).asset_layer.executable_asset_keys if jobs.has_job(job_name) else ()


def _state(run: dg.DagsterRun) -> State:
    if is_killed(run.run_id, run.tags):
        return "killed"
    return "running" if run.status in _AT_WORK else "queued"
