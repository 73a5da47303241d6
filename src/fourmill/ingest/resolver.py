"""Names to checked addresses: one cache for a worker process, kept over shards.

What the resolver answers is what is connected to. So a name that changes its mind (DNS rebinding) is caught whenever
it is looked up anew, and until then connections go to the address that was checked.
"""

import asyncio
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from aiohttp.abc import AbstractResolver, ResolveResult

from fourmill.ingest.addresses import AddressPolicy, RefusedAddressError, plain

Lookup = Callable[[str], list[str]]
"""Host name to addresses; blocks. Raises OSError."""

_TTL_S = 300.0  # getaddrinfo tells no TTL
_FAILURE_TTL_S = 30.0  # long enough for a shard's other rows of a dead host, short enough for a retry by hand
_MOST_HOSTS = 16_384  # about 8 MB; a shard of 10,000 rows fits


@dataclass(frozen=True)
class _Answer:
    addresses: list[str]
    error: OSError | None
    until: float  # on the resolver's clock


class CheckedResolver(AbstractResolver):
    """Resolves names to addresses that the policy lets through; connections go to just these.

    Answers are cached for five minutes, failures for half a minute (temporary ones not at all), 16,384 hosts at most;
    those who ask for one host at the same time share one lookup.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        connect_to: Mapping[str, str],
        lookup: Lookup | None = None,
        lookups: int = 64,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a resolver.

        Args:
            connect_to: "host:port" of a URL to "address:port" to connect to instead; taken as allowed.
            lookup: replaces getaddrinfo.
            lookups: at once, a thread each.
            timeout_s: for one lookup, from when its turn comes.
            clock: seconds, for the age of answers.
        """
        self._policy = policy
        self._connect_to = {key.lower(): value for key, value in connect_to.items()}
        self._lookup = lookup or _getaddrinfo
        self._timeout_s = timeout_s
        self._clock = clock
        self._cache: OrderedDict[str, _Answer] = OrderedDict()
        self._running: dict[str, asyncio.Task[_Answer]] = {}
        self._turns = asyncio.Semaphore(lookups)
        self._threads = ThreadPoolExecutor(lookups, thread_name_prefix="dns")

    def knows(self, host: str) -> bool:
        """Whether a name's good answer is at hand. Its port is still to be checked, as every connection does."""
        answer = self._cache.get(host)
        return answer is not None and answer.error is None and answer.until > self._clock()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of a host, which may be an address itself.

        Raises:
            RefusedAddressError: the host or the port may not be connected to.
            TimeoutError: no answer in time.
            OSError: there is no such host.
        """
        name = plain(host)
        instead = self._connect_to.get(f"{name}:{port}") if self._connect_to else None
        if instead:
            address, _, other_port = instead.rpartition(":")
            return [_result(host, address.strip("[]"), int(other_port))]
        self._policy.check_port(host, port)
        answer = self._cache.get(name)
        if answer is None or answer.until <= self._clock():
            if self._policy.check_literal(host):
                return [_result(host, host.strip("[]"), port)]
            answer = await self._ask(name, host)
        if answer.error is not None:
            raise type(answer.error)(*answer.error.args)  # a fresh one: a raised error gathers a traceback each time
        return [_result(host, one, port) for one in answer.addresses]

    async def close(self) -> None:
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._running.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _ask(self, name: str, host: str) -> _Answer:
        task = self._running.get(name)
        if task is None:
            task = self._running[name] = asyncio.create_task(self._look_up(name, host))
        return await asyncio.shield(task)  # one who gives up leaves the answer to the others

    async def _look_up(self, name: str, host: str) -> _Answer:
        try:
            answer = await self._answer(host)
            if answer.until > self._clock():
                self._cache[name] = answer
                self._cache.move_to_end(name)
                if len(self._cache) > _MOST_HOSTS:
                    self._cache.popitem(last=False)
            return answer
        finally:
            del self._running[name]

    async def _answer(self, host: str) -> _Answer:
        try:
            addresses = await self._in_thread(host)
            if not addresses:
                raise OSError(f"{host} has no address")
            good = self._policy.check_resolved(host, addresses)
        except (OSError, ValueError) as error:  # ValueError: host names that no encoding takes
            failure = error if isinstance(error, OSError) else OSError(str(error))
            lasts_s = 0.0 if is_temporary(failure) else _FAILURE_TTL_S
            return _Answer([], failure, self._clock() + lasts_s)
        return _Answer(good, None, self._clock() + _TTL_S)

    async def _in_thread(self, host: str) -> list[str]:
        await self._turns.acquire()
        loop = asyncio.get_running_loop()

        def end_turn(_: object) -> None:  # with the thread, which a timeout does not end
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._turns.release)

        try:
            job = self._threads.submit(self._lookup, host)
        except RuntimeError:
            self._turns.release()
            raise
        job.add_done_callback(end_turn)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(job)
        except TimeoutError:
            raise TimeoutError(f"{host} was not resolved within {self._timeout_s:g} s") from None


def is_temporary(error: OSError) -> bool:
    """Whether a lookup failed because a name server did not answer, so that the next one may not."""
    return isinstance(error, TimeoutError) or (isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN)


def _getaddrinfo(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)


__all__ = ["CheckedResolver", "Lookup", "RefusedAddressError", "is_temporary"]
