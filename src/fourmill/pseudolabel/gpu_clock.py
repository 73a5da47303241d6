"""When a GPU was computing for a network: events around its forward passes, on whatever streams they are."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch


class GpuClock:
    """Notes the begin and end of forward passes as the GPU meets them, which is later than when they are asked for."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._zero: tuple[torch.cuda.Event, float] | None = None

    def begin(self) -> None:
        """Forget what was, and note from now on."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        with self._lock:
            self._zero, self._passes = (event, time.monotonic()), []

    @contextmanager
    def around(self) -> Iterator[None]:
        """A forward pass on the current stream."""
        if self._zero is None:
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        with self._lock:
            self._passes.append((start, end))

    def spans(self) -> list[tuple[float, float]]:
        """Begin and end of each pass since `begin`, in seconds of `time.monotonic`; waits for those under way. Notes no more."""
        with self._lock:
            zero, passes = self._zero, self._passes
            self._zero, self._passes = None, []
        if zero is None:
            return []
        event, at_s = zero
        found: list[tuple[float, float]] = []
        for start, end in passes:
            end.synchronize()
            found.append((at_s + event.elapsed_time(start) / 1000, at_s + event.elapsed_time(end) / 1000))
        return found
