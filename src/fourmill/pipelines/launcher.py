"""How runs of the UI, of schedules and of sensors are started: as Dagster does it, and their processes are looked after.

Dagster's own launcher cannot tell whether a run's process still lives. One that was killed would stay "started", with its
slots in the pools, until somebody ends it by hand. Nor can it end a run that it has not started.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus  # what a launcher answers the daemon with
from dagster._core.storage.tags import GRPC_INFO_TAG  # which only runs have that Dagster's launcher started

from fourmill.runtime.run_process import is_killed, is_marked, pid_of

KILLED = "its process is gone; the next run continues from what it had finished"
_AGAIN_AFTER_S, _TIMES = 20.0, 10  # long enough for a run to end by itself once it has heard
_UNMARKED_S = 600.0  # a run says which process it is in with its first asset, some seconds after its start


class WatchedRunLauncher(dg.DefaultRunLauncher):
    """Dagster's launcher on this machine; its daemon marks runs failed whose process is gone (`run_monitoring`).

    Runs of `fourmill run` can be ended in the UI too: the command is interrupted, as by Ctrl-C.
    """

    @property
    def supports_check_run_worker_health(self) -> bool:
        """True: `check_run_worker_health` can be asked."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether a run's process lives, as far as this machine can tell."""
        if is_lost(self._instance, run):
            return CheckRunHealthResult(WorkerStatus.FAILED, KILLED)
        return CheckRunHealthResult(WorkerStatus.RUNNING)

    def terminate(self, run_id: str) -> bool:
        """End a run; false where that is not possible from here."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished or not is_of_command_line(run) or is_killed(run_id, run.tags):
            return super().terminate(run_id)
        pid = pid_of(run_id, run.tags)
        if pid is None or not _may_signal(pid):
            return False
        self._instance.report_run_canceling(run)
        os.kill(pid, signal.SIGINT)
        Thread(
            target=_interrupt_again, args=(self._instance, run_id, pid), name=f"end {run_id[:8]}", daemon=True
        ).start()
        return True


def _interrupt_again(
    instance: dg.DagsterInstance, run_id: str, pid: int, pause: Callable[[float], None] = time.sleep
) -> None:
    """Until the run has ended: Python drops what a signal's handler raises while it calls back from its garbage collector."""
    for _ in range(_TIMES):
        pause(_AGAIN_AFTER_S)
        run = instance.get_run_by_id(run_id)
        if run is None or run.is_finished or is_killed(run_id, run.tags):
            return
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGINT)


def is_of_command_line(run: dg.DagsterRun) -> bool:
    """Whether a run that has begun is in the process of a command, and not in one that a launcher started."""
    return GRPC_INFO_TAG not in run.tags


def is_lost(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the process of a run that has begun is gone, or it has not said for ten minutes which one it is in."""
    if is_marked(run.run_id, run.tags):
        return is_killed(run.run_id, run.tags)
    record = instance.get_run_record_by_id(run.run_id)
    return record is not None and time.time() - record.update_timestamp.timestamp() > _UNMARKED_S


def _may_signal(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (PermissionError, ProcessLookupError):
        return False
    return True
