"""Who may be at which host, over all workers: the book that hands out leases. One of it serves a whole cluster.

A worker reports, some times a second at most, for each host how many turns it holds and how many more it wants; the
answer is how many it may hold now and how many it should come down to. Reports are whole, so a lost one does no harm,
and a worker that stops reporting loses what it held when its lease ends. The book knows neither network nor threads.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

LEASE_S = 15.0  # a killed worker's turns come back after this
TURN_S = 2.0  # a worker keeps turns that others wait for this long

Claims = Mapping[str, tuple[int, int]]
"""Host to (turns held, turns wanted beside them)."""
Grants = dict[str, tuple[int, int]]
"""Host to (turns that may be held, turns to come down to as they end)."""


@dataclass
class _Claim:
    held: int
    wanted: int
    since: float  # when it began to hold
    asked: float  # when it began to wait: its place in the queue


class LeaseBook:
    """Turns at hosts and the workers that hold them. The sum of what is granted never exceeds a host's limit.

    A free turn goes to the worker that has waited longest; when several want a host they share it evenly, and where
    there are more workers than turns they take turns.
    """

    def __init__(
        self,
        lease_s: float = LEASE_S,
        turn_s: float = TURN_S,
        clock: Callable[[], float] = time.monotonic,
        quiet_s: float = 0.0,
    ) -> None:
        """Open an empty book.

        Args:
            quiet_s: grant nothing for so long: a book that replaces a lost one first hears what is held already.
        """
        self._lease_s = lease_s
        self._turn_s = turn_s
        self._clock = clock
        self._quiet_until = clock() + quiet_s
        self._hosts: dict[str, dict[str, _Claim]] = {}
        self._workers: dict[str, tuple[float, set[str]]] = {}  # lease's end, hosts with a claim

    def sync(self, worker: str, limit: int, claims: Claims) -> Grants:
        """Take a worker's report of all it holds and wants; answer what it may hold.

        Args:
            limit: turns a host, as this worker is configured.
        """
        now = self._clock()
        for name in [name for name, (until, _) in self._workers.items() if until < now]:
            self._forget(name, self._workers.pop(name)[1])
        _, before = self._workers.get(worker, (now, set()))
        self._forget(worker, before - claims.keys())
        if claims:
            self._workers[worker] = (now + self._lease_s, set(claims))
        else:
            self._workers.pop(worker, None)
        for host, (held, wanted) in claims.items():
            self._record(host, worker, held, wanted, now)
        return {host: self._settle(host, worker, limit, now) for host in claims}

    def held(self, host: str) -> int:
        """Turns at a host that are out."""
        return sum(claim.held for claim in self._hosts.get(host, {}).values())

    def _forget(self, worker: str, hosts: set[str]) -> None:
        for host in hosts:
            claims = self._hosts[host]
            del claims[worker]
            if not claims:
                del self._hosts[host]

    def _record(self, host: str, worker: str, held: int, wanted: int, now: float) -> None:
        claims = self._hosts.setdefault(host, {})
        claim = claims.get(worker)
        if claim is None:
            claims[worker] = _Claim(held, wanted, now, now)
            return
        if not claim.held:
            claim.since = now
        if not claim.wanted or (claim.held and not held):
            claim.asked = now
        claim.held, claim.wanted = held, wanted

    def _settle(self, host: str, worker: str, limit: int, now: float) -> tuple[int, int]:
        claims = self._hosts[host]
        mine = claims[worker]
        fair = limit // len(claims)
        hungry = [one for one in claims.values() if one is not mine and one.wanted and one.held < max(1, fair)]
        free = limit - sum(one.held for one in claims.values())
        granted = 0 if now < self._quiet_until else self._grant(mine, free, fair, hungry)
        if granted:
            mine.held, mine.wanted, mine.asked = mine.held + granted, mine.wanted - granted, now
        others_lack = len(hungry) > free - granted
        must_yield = others_lack and not granted and mine.held > fair and now - mine.since >= self._turn_s
        return mine.held, fair if must_yield else mine.held

    def _grant(self, mine: _Claim, free: int, fair: int, hungry: list[_Claim]) -> int:
        share = max(1, fair)
        if not hungry:
            return max(0, min(mine.wanted, free))
        if mine.held >= share:
            return 0
        ahead = sum(one.asked < mine.asked for one in hungry)
        return max(0, min(mine.wanted, free - ahead, share - mine.held))
