"""A worker's side of `host_leases`: turns at hosts that are leased in batches, never asked for one URL at a time."""

import asyncio
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fourmill.ingest.host_leases import LEASE_S, Grants
from fourmill.ingest.hosts import HostQueue

Sync = Callable[[str, int, dict[str, tuple[int, int]]], Awaitable[Grants]]
"""`LeaseBook.sync`, wherever the book is."""

_LOG = logging.getLogger(__name__)
_TICK_S = 0.1  # between reports while something waits or may be given back
_GIVE_UP_S = 4 * LEASE_S
_MOST_BLOCKED = 1000  # hosts asked for again although others hold them, so that a report stays small
_CLOSE_S = 5.0


class HostLimitsError(RuntimeError):
    """The keeper of the limits has not answered for long."""


class LeasedHostLimits:
    """`HostLimits` over all workers that share one `LeaseBook`.

    Turns are leased for the hosts that come next, at most `most` in all, and are used for one URL of a host after the
    other as long as nobody else asks for it. All that is idle is given back with the next report. Without an answer
    for a lease's time no request is begun.
    """

    def __init__(
        self,
        sync: Sync,
        limit: int,
        most: int = 256,
        lease_s: float = LEASE_S,
        give_up_s: float = _GIVE_UP_S,
        pause: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the limits of one worker; nothing is asked before the first turn is wanted.

        Args:
            sync: reports to the book.
            limit: turns a host.
            most: turns leased ahead in all; some times the requests that the worker has in flight.
            lease_s: the book's.
            give_up_s: without an answer for so long, waits end with HostLimitsError.
            pause: awaited with the seconds between reports.
            clock: seconds, for the age of leases.
        """
        self._sync = sync
        self._limit = limit
        self._most = most
        self._lease_s = lease_s
        self._give_up_s = give_up_s
        self._pause = pause
        self._clock = clock
        self._worker = secrets.token_hex(8)
        self._hosts: dict[str, HostQueue] = {}
        self._held: dict[str, HostQueue] = {}  # with turns
        self._new: OrderedDict[str, HostQueue] = OrderedDict()  # wanted, not asked for
        self._blocked: OrderedDict[str, HostQueue] = OrderedDict()  # asked for, others are there
        self._idle_turns = False
        self._answered = clock()  # when the last report that was answered was sent
        self._task: asyncio.Task[None] | None = None

    async def acquire(self, host: str) -> None:
        """Wait for a turn at a host.

        Raises:
            HostLimitsError: the keeper of the limits has not answered for long.
        """
        queue = self._hosts.get(host)
        if queue is None:
            queue = self._hosts[host] = self._new[host] = HostQueue(0)
        if self._task is None or self._task.done():
            self._answered = self._clock()
            self._task = asyncio.create_task(self._report())
        await queue.take()

    def release(self, host: str) -> None:
        """Give a turn back."""
        queue = self._hosts[host]
        queue.give()
        self._idle_turns = self._idle_turns or queue.used < queue.capacity

    async def close(self) -> None:
        """Give all leases back."""
        if self._task is None:
            return
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._task = None
        for known in (self._hosts, self._held, self._new, self._blocked):
            known.clear()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._sync(self._worker, self._limit, {})
        except Exception as error:  # they come back with the end of the lease
            _LOG.debug("leases of hosts were not given back: %s", error)

    async def _report(self) -> None:
        await asyncio.sleep(0)  # all who begin to wait now are in the first report
        while self._hosts:
            age_s = self._clock() - self._answered
            if age_s > self._lease_s:
                for queue in self._held.values():
                    queue.capacity = 0
            if self._new or self._blocked or self._idle_turns or self._has_waiters() or age_s > self._lease_s / 3:
                await self._exchange()
            if self._hosts:
                await self._pause(_TICK_S)

    def _has_waiters(self) -> bool:
        return any(queue.waiters for queue in self._held.values())

    async def _exchange(self) -> None:
        claims = self._claims()
        sent = self._clock()
        try:
            async with asyncio.timeout(self._lease_s):
                grants = await self._sync(self._worker, self._limit, claims)
        except Exception as error:
            self._unanswered(error)
            return
        self._answered = sent
        for host, (held, share) in grants.items():
            queue = self._hosts[host]
            queue.capacity = min(held, share)
            queue.serve()
            self._idle_turns = self._idle_turns or queue.used < queue.capacity
            self._new.pop(host, None)
            if held:
                self._blocked.pop(host, None)
                self._held[host] = queue
            else:
                self._blocked[host] = queue

    def _claims(self) -> dict[str, tuple[int, int]]:
        claims: dict[str, tuple[int, int]] = {}
        self._idle_turns = False
        ahead = 0
        for host, queue in list(self._held.items()):
            queue.capacity = min(queue.capacity, queue.used)  # what is idle is given back herewith
            if queue.used:
                claims[host] = (queue.used, self._wanted(queue))
                ahead += sum(claims[host])
                continue
            del self._held[host]
            if queue.waiters:  # it had to yield
                self._blocked[host] = queue
            else:
                del self._hosts[host]
        for waiting, most in ((self._blocked, _MOST_BLOCKED), (self._new, self._most - ahead)):
            for host, queue in list(waiting.items()):
                if not queue.waiters:
                    del waiting[host], self._hosts[host]
                elif most > 0:
                    claims[host] = (0, self._wanted(queue))
                    most -= 1 if waiting is self._blocked else claims[host][1]
                else:
                    break
        return claims

    def _wanted(self, queue: HostQueue) -> int:
        return min(len(queue.waiters), self._limit - min(queue.used, self._limit))

    def _unanswered(self, error: Exception) -> None:
        silent_s = self._clock() - self._answered
        _LOG.warning("limits of hosts not answered for %.0f s: %s", silent_s, error)
        if silent_s < self._give_up_s:
            return
        for queue in self._hosts.values():
            while queue.waiters:
                waiter = queue.waiters.popleft()
                if not waiter.done():
                    waiter.set_exception(
                        HostLimitsError(
                            f"the keeper of the limits per host has not answered for {silent_s:.0f} s ({error}); "
                            "see whether Ray's head node is alive, then run the block again"
                        )
                    )
