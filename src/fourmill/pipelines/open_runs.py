"""Runs that have not ended: of the UI, of schedules, of the command line; and those that were killed and cannot say so."""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import dagster as dg

from fourmill.pipelines.launcher import KILLED, is_lost, is_of_command_line
from fourmill.pipelines.status import Place
from fourmill.runtime.run_process import is_alive, is_killed

RunState = Literal["queued", "running", "killed"]
_PARTITION_TAG = "dagster/partition"
_BEGUN = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
_OPEN = [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, *_BEGUN]
_ASK_EVERY_S = 2.0
_MOST_NAMES = 3


@dataclass(frozen=True)
class OpenRun:
    """A run that has not ended; "killed" is one whose process has."""

    run_id: str
    job: str
    partition: str | None
    keys: frozenset[dg.AssetKey]
    state: RunState

    @property
    def name(self) -> str:
        """`run 1a2b3c4d (label_block block_00)`, with as much of its id as the UI shows; its assets where no job has a name."""
        what = self.job if not self.job.startswith("__") else self._assets
        return f"run {self.run_id[:8]} ({' '.join(filter(None, [what, self.partition]))})"

    @property
    def _assets(self) -> str:
        names = sorted(key.to_user_string() for key in self.keys)
        return ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else "")

    def makes(self, place: Place) -> bool:
        """Whether an asset, or that block of it, was asked of the run."""
        key, partition = place
        return key in self.keys and partition in (None, self.partition)


def open_runs(instance: dg.DagsterInstance, jobs: dg.RepositoryDefinition) -> list[OpenRun]:
    """All of them, the newest first.

    Args:
        jobs: the project's, which know what runs make that were started as a whole.
    """
    found: list[OpenRun] = []
    for run in instance.get_runs(dg.RunsFilter(statuses=_OPEN)):
        keys = frozenset(run.asset_selection or _keys_of(run.job_name, jobs))
        found.append(OpenRun(run.run_id, run.job_name, run.tags.get(_PARTITION_TAG), keys, _state(instance, run)))
    return found


def close_killed(instance: dg.DagsterInstance, alone: bool = False) -> int:
    """Mark runs failed whose process is gone (`kill -9` leaves them "started"); return how many.

    Args:
        alone: this process holds the lock of the project's folder (`preflight.only_one`), so that whatever run of the command line is
            not in a process that lives here is of one that does not, be it in a container that is no more.
    """
    killed = [run for run in instance.get_runs(dg.RunsFilter(statuses=_OPEN)) if _is_gone(instance, run, alone)]
    for run in killed:
        instance.report_run_failed(run, KILLED)
    return len(killed)


def wait_for_others(
    instance: dg.DagsterInstance,
    jobs: dg.RepositoryDefinition,
    places: Collection[Place],
    tell: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> bool:
    """Wait until no other run makes one of these places: both would do the same work. Returns whether there was one.

    Args:
        tell: is told of each run that is waited for.
        pause: waits for so many seconds.
    """
    told: set[str] = set()
    while busy := [one for one in open_runs(instance, jobs) if one.state == "running" and _meets(one, places)]:
        for one in busy:
            if one.run_id not in told:
                tell(f"{one.name} is making the same; waiting until it ends (it can be ended in `fourmill ui`)")
                told.add(one.run_id)
        pause(_ASK_EVERY_S)
        close_killed(instance)
    return bool(told)


def _meets(run: OpenRun, places: Collection[Place]) -> bool:
    return any(run.makes(place) for place in places)


def _keys_of(job_name: str, jobs: dg.RepositoryDefinition) -> Iterable[dg.AssetKey]:
    """The assets of a job that was started as a whole; none of a job that the project no longer has."""
    return jobs.get_job(job_name).asset_layer.executable_asset_keys if jobs.has_job(job_name) else ()


def _state(instance: dg.DagsterInstance, run: dg.DagsterRun) -> RunState:
    if _is_gone(instance, run, alone=False):
        return "killed"
    return "running" if run.status in _BEGUN else "queued"


def _is_gone(instance: dg.DagsterInstance, run: dg.DagsterRun, alone: bool) -> bool:
    if run.status not in _BEGUN:
        return is_killed(run.run_id, run.tags)
    if is_lost(instance, run):
        return True
    is_ours = run.status != dg.DagsterRunStatus.STARTING and is_of_command_line(
        run
    )  # a launcher marks its own while they start
    return alone and is_ours and not is_alive(run.run_id, run.tags)
