"""What work costs: CPU time of a process and all below it, wall time, memory."""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Cost:
    """Seconds."""

    cpu_s: float
    wall_s: float


def cpu_seconds() -> float:
    """User and system time of this process and all below it, those that have ended included."""
    here = psutil.Process()
    used = 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used += times.user + times.system
    ended = os.times()
    return used + ended.children_user + ended.children_system


def cost_of(work: Callable[[], object]) -> Cost:
    """Do it, and say what it took."""
    cpu, wall = cpu_seconds(), time.monotonic()
    work()
    return Cost(cpu_seconds() - cpu, time.monotonic() - wall)


def rss_mb() -> float:
    """Memory of this process, after a collection."""
    gc.collect()
    return psutil.Process().memory_info().rss / 1e6
