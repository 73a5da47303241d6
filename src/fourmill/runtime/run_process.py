"""Which process a run is in, so that a run whose process was killed is told from one that is at work."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

_TAG = "fourmill/process"


class _Mark(NamedTuple):
    """A process: its machine's name and start, what its process ids count in, its id, and when it was started."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: str


def process_tags(run_id: str, pid: int | None = None) -> dict[str, str]:
    """The tag of a run that is in a process of this machine, this one by default. Raises psutil.NoSuchProcess.

    It names the run too: one that is executed again is given the tags of the first.
    """
    pid = pid or os.getpid()
    return {_TAG: " ".join([run_id, *_here(), str(pid), _start_of(pid)])}


def is_killed(run_id: str, tags: Mapping[str, str]) -> bool:
    """Whether the process of a run that has not ended is gone, or its machine was started anew.

    Of other machines, and of other containers of this one, nobody can tell: false, as without a tag.
    """
    mark = _mark_of(run_id, tags)
    host, boot, namespace = _here()
    if mark is None or mark.host != host:
        return False
    if mark.boot != boot:
        return True
    return mark.namespace == namespace and not _lives(mark)


def is_alive(run_id: str, tags: Mapping[str, str]) -> bool:
    """Whether a run's process is known to live, on this machine."""
    return pid_of(run_id, tags) is not None and not is_killed(run_id, tags)


def is_marked(run_id: str, tags: Mapping[str, str]) -> bool:
    """Whether a run says which process it is in."""
    return _mark_of(run_id, tags) is not None


def pid_of(run_id: str, tags: Mapping[str, str]) -> int | None:
    """The process that a run is in, where its id can be used here."""
    mark = _mark_of(run_id, tags)
    return mark.pid if mark is not None and mark[:3] == _here() else None


def _mark_of(run_id: str, tags: Mapping[str, str]) -> _Mark | None:
    of, *parts = tags.get(_TAG, "").split(" ")
    if of != run_id or len(parts) != len(_Mark._fields):
        return None
    host, boot, namespace, pid, started = parts
    return _Mark(host, boot, namespace, int(pid), started)


def _here() -> tuple[str, str, str]:
    return socket.gethostname(), _boot(), _namespace()


def _boot() -> str:
    """What is another one after each start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid").replace(" ", "")
    except OSError:
        return "unknown"


def _start_of(pid: int) -> str:
    """When a process was started, by a clock that is never set where the system has one."""
    process = psutil.Process(pid)
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        )  # field 22, ticks since the machine's start
    except OSError:
        return f"{process.create_time():.0f}"


def _lives(mark: _Mark) -> bool:
    try:
        return psutil.Process(mark.pid).status() != psutil.STATUS_ZOMBIE and _start_of(mark.pid) == mark.started
    except psutil.NoSuchProcess:
        return False
