"""How many requests one host may get at once: the seam to whoever counts them, and the count within one event loop.

And when a host that asked for a pause may be asked again.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fourmill.ingest.statuses import FetchStatus

_MOST_PAUSES = 4096


class HostLimits(Protocol):
    """Hands out turns at hosts. Used from one event loop; waiters of a host are served in the order they came."""

    async def acquire(self, host: str) -> None:
        """Wait for a turn at a host. A cancelled wait takes none."""
        ...

    def release(self, host: str) -> None:
        """Give a turn back."""
        ...

    async def close(self) -> None:
        """Give everything back; no turn may be taken afterwards."""
        ...


class HostQueue:
    """One host: turns that may be taken, turns taken, and who waits for one."""

    __slots__ = ("capacity", "used", "waiters")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.waiters: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Take a turn now or when one comes free."""
        if self.used < self.capacity and not self.waiters:
            self.used += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.give()  # the turn came together with the cancellation
            elif waiter in self.waiters:
                self.waiters.remove(waiter)
            raise

    def give(self) -> None:
        """Give a turn back; the next in line has it."""
        self.used -= 1
        self.serve()

    def serve(self) -> None:
        """Hand free turns to those who wait."""
        while self.waiters and self.used < self.capacity:
            waiter = self.waiters.popleft()
            if not waiter.done():
                self.used += 1
                waiter.set_result(None)

    @property
    def is_idle(self) -> bool:
        """Nobody is at this host and nobody waits for it."""
        return not self.used and not self.waiters


class LocalHostLimits:
    """At most `limit` turns a host, counted in this process alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._hosts: dict[str, HostQueue] = {}

    async def acquire(self, host: str) -> None:
        queue = self._hosts.get(host)
        if queue is None:
            queue = self._hosts[host] = HostQueue(self._limit)
        try:
            await queue.take()
        except asyncio.CancelledError:
            self._forget(host, queue)
            raise

    def release(self, host: str) -> None:
        queue = self._hosts[host]
        queue.give()
        self._forget(host, queue)

    async def close(self) -> None:
        self._hosts.clear()

    def _forget(self, host: str, queue: HostQueue) -> None:
        if queue.is_idle and self._hosts.get(host) is queue:
            del self._hosts[host]


@dataclass(frozen=True)
class Pause:
    """What a host's Retry-After asked for, and the answer that came with it."""

    until: float  # by the clock of the pauses
    asked_s: float
    is_long: bool  # nobody waits for its end
    status: FetchStatus
    http_status: int | None


class HostPauses:
    """Pauses that hosts asked for, of one downloader. The oldest is forgotten when there are more than `most`."""

    def __init__(self, clock: Callable[[], float], most: int = _MOST_PAUSES) -> None:
        self._clock = clock
        self._most = most
        self._hosts: OrderedDict[str, Pause] = OrderedDict()

    def ask(self, host: str, seconds: float, is_long: bool, status: FetchStatus, http_status: int | None) -> None:
        """Note what a host asked for; a shorter pause than the one it has changes nothing."""
        until = self._clock() + seconds
        before = self._hosts.get(host)
        if before is not None and before.until >= until:
            return
        self._hosts[host] = Pause(until, seconds, is_long, status, http_status)
        self._hosts.move_to_end(host)
        if len(self._hosts) > self._most:
            self._hosts.popitem(last=False)

    def of(self, host: str) -> Pause | None:
        """The pause that a host is in."""
        pause = self._hosts.get(host)
        if pause is not None and pause.until <= self._clock():
            del self._hosts[host]
            return None
        return pause

    def left_s(self, pause: Pause) -> float:
        """Seconds until a pause ends."""
        return max(0.0, pause.until - self._clock())

    def __len__(self) -> int:
        return len(self._hosts)
