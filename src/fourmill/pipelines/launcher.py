"""How runs of the UI, of schedules and of sensors are started: as Dagster does it, and their processes are looked after.

Dagster's own launcher cannot tell whether a run's process still lives. One that was killed would stay "started", with its
slots in the pools, until somebody ends it by hand.
"""

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus  # what a launcher answers the daemon with

from fourmill.runtime.run_process import is_killed

KILLED = "its process is gone; the next run continues from what it had finished"


class WatchedRunLauncher(dg.DefaultRunLauncher):
    """Dagster's launcher on this machine; its daemon marks runs failed whose process is gone (`run_monitoring`)."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """True: `check_run_worker_health` can be asked."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether a run's process lives, as far as this machine can tell."""
        if is_killed(run.run_id, run.tags):
            return CheckRunHealthResult(WorkerStatus.FAILED, KILLED)
        return CheckRunHealthResult(WorkerStatus.RUNNING)
