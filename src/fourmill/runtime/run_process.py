"""Which process a run is in, so that a run whose process was killed is told from one that is at work."""

import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

import psutil

_TAG = "fourmill/process"
_MAX_CLOCK_SHIFT_S = 60.0  # start times are counted from the machine's start, by a clock that may be set


class _Mark(NamedTuple):
    host: str
    pid: int
    started: float


def process_tags(run_id: str, pid: int | None = None) -> dict[str, str]:
    """The tag of a run that is in a process of this machine, this one by default. Raises psutil.NoSuchProcess.

    It names the run too: one that is executed again is given the tags of the first.
    """
    process = psutil.Process(pid or os.getpid())
    return {_TAG: f"{run_id}:{socket.gethostname()}:{process.pid}:{process.create_time():.0f}"}


def is_killed(run_id: str, tags: Mapping[str, str]) -> bool:
    """Whether the process of a run that has not ended is gone. Of other machines' nobody can tell: false, as without a tag."""
    found = _mark_of(run_id, tags)
    if found is None or found.host != socket.gethostname():
        return False
    try:
        process = psutil.Process(found.pid)
        is_same = abs(process.create_time() - found.started) < _MAX_CLOCK_SHIFT_S
        return not is_same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pid_of(run_id: str, tags: Mapping[str, str]) -> int | None:
    """The process that a run is in, if it is one of this machine."""
    found = _mark_of(run_id, tags)
    return found.pid if found and found.host == socket.gethostname() else None


def _mark_of(run_id: str, tags: Mapping[str, str]) -> _Mark | None:
    of, *mark = tags.get(_TAG, "").split(":")
    if of != run_id or len(mark) != len(_Mark._fields):
        return None
    host, pid, started = mark
    return _Mark(host, int(pid), float(started))
