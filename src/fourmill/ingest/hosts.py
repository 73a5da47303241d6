"""How many requests one host may get at once: the seam to whoever counts them, and the count within one event loop."""

import asyncio
from collections import deque
from typing import Protocol


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
