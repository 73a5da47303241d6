"""One URL to bytes or to the class of its failure: redirects, retries, limits and address checks around aiohttp."""

import asyncio
import functools
import random
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from fourmill.ingest.addresses import AddressPolicy
from fourmill.ingest.config import IngestConfig
from fourmill.ingest.failures import FetchFailedError, bad_response, no_address, no_response
from fourmill.ingest.hosts import HostLimits, HostPauses, LocalHostLimits
from fourmill.ingest.inflate import Inflater
from fourmill.ingest.resolver import CheckedResolver, Lookup
from fourmill.ingest.robots import agent_names, refusal
from fourmill.ingest.statuses import FetchStatus

_KEEP_ALIVE_S = 15.0
_MOST_KEPT_HOSTS = 128  # whose connections stay open between requests; aiohttp bounds no idle ones by itself
_READ_BUFFER = 256 * 1024  # most images arrive whole before reading would have to pause


@dataclass(frozen=True)
class Fetched:
    """What became of one URL. `data` is the body when `status` is "ok", else empty.

    Of a body that came as gzip or deflate `data` is what it decodes to, and so are size and sha256 of the ledger.
    """

    status: FetchStatus
    reason: str | None
    data: bytes
    final_url: str  # after redirects, without credentials
    http_status: int | None  # of the last response, None when there was none
    content_type: str | None  # as the last response claims it
    attempts: int
    seconds: float  # in all, waits included


@dataclass
class _Trail:
    """How far one attempt got."""

    url: str
    left_s: float  # of the attempt's time
    pauses_left: int  # of hosts, that may still be waited for
    http_status: int | None = None
    content_type: str | None = None


@dataclass
class _KeptHosts:
    """Hosts whose connections stay open: those seen last, so that a shard of ten thousand hosts keeps few sockets."""

    seen: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def keeps(self, host: str) -> bool:
        now = time.monotonic()
        while self.seen and next(iter(self.seen.values())) < now - _KEEP_ALIVE_S:
            self.seen.popitem(last=False)
        if host not in self.seen and len(self.seen) >= _MOST_KEPT_HOSTS:
            return False
        self.seen[host] = now
        self.seen.move_to_end(host)
        return True


class _Held(AbstractAsyncContextManager[Fetched]):  # a generator would cost three times as much
    __slots__ = ("_fetch", "_has_slot", "_slots")

    def __init__(self, fetch: Coroutine[None, None, Fetched], slots: asyncio.Semaphore) -> None:
        self._fetch, self._slots, self._has_slot = fetch, slots, False

    async def __aenter__(self) -> Fetched:
        fetched = await self._fetch
        self._has_slot = fetched.status == "ok"
        return fetched

    async def __aexit__(self, *raised: object) -> None:
        if self._has_slot:
            self._slots.release()


class Downloader:
    """An HTTP client for one event loop: `async with Downloader(config, {}) as get: await get.fetch(url)`.

    Made once a worker process and kept over shards: connections are kept alive, names and the TLS context shared. Names
    are resolved by a resolver that answers with public addresses only (or any, for `allow_hosts`), so that what was
    checked is what is connected to, at every redirect. Environment proxies, cookies, referrers and credentials in URLs
    are not used. A connection that breaks before its response is asked once more by aiohttp itself, since a kept one
    may have gone stale; that does not count as an attempt.

    A request takes a turn at its host, then resolves the name, then takes one of the `concurrency` slots; it gives both
    back before it waits for a retry or follows a redirect. So neither busy nor slow nor flapping hosts stop the others,
    and all URLs of a shard may be fetched at once.

    A Retry-After of HTTP 429 or 5xx holds for the host: its other URLs wait as well, each for `retries` + 1 such pauses
    at most. When it asks for more than `max_retry_wait_s`, that URL and the host's others end at once, with its status,
    until the time that it asked for is over.
    """

    def __init__(
        self,
        config: IngestConfig,
        connect_to: Mapping[str, str] | None = None,
        wait: Callable[[float], Awaitable[object]] = asyncio.sleep,
        lookup: Lookup | None = None,
        host_limits: HostLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a client; nothing is opened before `async with`.

        Args:
            config: limits, timeouts, retries, allowed hosts.
            connect_to: "host:port" of URLs to "address:port" to connect to instead, for hosts served on this machine;
                the host must be a name, not an address.
            wait: awaited with the seconds before a retry or until a host's pause is over.
            lookup: host name to addresses, in place of the system's.
            host_limits: who counts the requests to a host, closed together with the downloader; by default it does so
                itself, `per_host` for each.
            clock: seconds, for the ends of pauses; it must go on while `wait` is awaited.
        """
        self._config = config
        self._policy = AddressPolicy(config.allow_hosts, config.allow_ports)
        self._connect_to = dict(connect_to or {})
        self._wait = wait
        self._lookup = lookup
        self._hosts = host_limits or LocalHostLimits(config.per_host)
        self._pauses = HostPauses(clock)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._kept = _KeptHosts()
        self._agents = agent_names(config.user_agent)
        self._whole = self._timeouts(config.total_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._resolver: CheckedResolver | None = None

    async def __aenter__(self) -> Self:
        config = self._config
        tls = _tls_context(config.ca_file) if config.ca_file else True
        self._resolver = CheckedResolver(
            self._policy, self._connect_to, self._lookup, config.lookups, config.connect_timeout_s
        )
        # limits are kept here, where waiting for them comes before the timeouts; names are cached by the resolver
        connector = aiohttp.TCPConnector(
            resolver=self._resolver, limit=0, use_dns_cache=False, keepalive_timeout=_KEEP_ALIVE_S, ssl=tls
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            # identity: an image gains nothing from compression; `_body` undoes that of servers that compress all the same
            headers={"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            read_bufsize=_READ_BUFFER,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()
            self._session = None
        if self._resolver:
            await self._resolver.close()
            self._resolver = None
        await self._hosts.close()

    async def fetch(self, url: str) -> Fetched:
        """Download one URL. Never raises for what a URL or a server may do; the status says it."""
        async with self.held(url) as fetched:
            return fetched

    def held(self, url: str) -> AbstractAsyncContextManager[Fetched]:
        """As `fetch`, with the slot of a body kept while the block runs: `async with get.held(url) as fetched: ...`.

        So there are at most `concurrency` bodies in flight or in hand, however slowly they are used up.
        """
        return _Held(self._fetch(url), self._slots)

    async def _fetch(self, url: str) -> Fetched:
        start = time.monotonic()
        attempt = 0
        jitter: random.Random | None = None
        pauses_left = self._config.retries + 1
        while True:
            attempt += 1
            trail = _Trail(url, self._config.total_timeout_s, pauses_left)
            status: FetchStatus = "ok"
            reason, data = None, b""
            try:
                data = await self._follow(trail)
            except FetchFailedError as error:
                if error.may_pass and attempt <= self._config.retries:
                    pauses_left = trail.pauses_left
                    jitter = jitter or random.Random(url)  # enough chance: only URLs have to differ
                    await self._wait(self._pause_s(attempt, error.retry_after_s, jitter))
                    continue
                status, reason = error.status, error.reason
                trail.http_status = error.http_status
            seconds = round(time.monotonic() - start, 4)
            return Fetched(status, reason, data, trail.url, trail.http_status, trail.content_type, attempt, seconds)

    def _pause_s(self, attempt: int, retry_after_s: float | None, jitter: random.Random) -> float:
        pause = self._config.retry_wait_s * 2 ** (attempt - 1) * (0.5 + jitter.random())
        return min(max(pause, retry_after_s or 0.0), self._config.max_retry_wait_s)

    async def _follow(self, trail: _Trail) -> bytes:
        try:
            target = URL(trail.url)
            if target.raw_user is not None or target.raw_password is not None:
                target = target.with_user(None)
                trail.url = str(target)
        except ValueError as error:
            raise FetchFailedError("dns", f"no host can be read from the URL: {error}") from error
        for _ in range(self._config.max_redirects + 1):
            answer = await self._request(target, trail)
            if isinstance(answer, bytes):
                return answer
            target, trail.url = answer, str(answer)
        raise FetchFailedError("redirects", f"more than {self._config.max_redirects} redirects", trail.http_status)

    async def _request(self, url: URL, trail: _Trail) -> bytes | URL:
        """One request: where it redirects to, or the body, and then its slot is still taken."""
        host = url.raw_host
        if self._session is None or self._resolver is None:
            raise RuntimeError("use the Downloader inside `async with`")
        if not host:
            raise FetchFailedError("dns", "the URL names no host")
        trail.http_status = trail.content_type = None
        answer = None
        while answer is None:
            if self._pauses:
                await self._until_welcome(host, trail)
            answer = await self._in_turn(self._session, self._resolver, url, host, trail)
        return answer

    async def _in_turn(
        self, session: aiohttp.ClientSession, resolver: CheckedResolver, url: URL, host: str, trail: _Trail
    ) -> bytes | URL | None:
        """As `_request`; None when the host asked for a pause before this turn came."""
        await self._hosts.acquire(host)
        try:
            if not resolver.knows(host):  # before a slot is taken: a slow name server stops nobody else
                try:
                    await resolver.resolve(host, url.port or 0)
                except OSError as error:
                    raise no_address(host, error) from error
            await self._slots.acquire()
            answer = None
            try:
                if not self._pauses or not self._pauses.of(host):
                    answer = await self._timed(session, url, trail)
                return answer
            finally:
                if not isinstance(answer, bytes):
                    self._slots.release()
        finally:
            self._hosts.release(host)

    async def _until_welcome(self, host: str, trail: _Trail) -> None:
        """Wait for the end of a pause that the host asked for."""
        while pause := self._pauses.of(host):
            if pause.is_long or not trail.pauses_left:
                reason = (
                    f"not asked: {host} answered HTTP {pause.http_status} with a Retry-After of {pause.asked_s:.0f} s"
                )
                raise FetchFailedError(pause.status, reason, pause.http_status)
            trail.pauses_left -= 1
            await self._wait(self._pauses.left_s(pause))

    def _heard(self, host: str, error: FetchFailedError) -> FetchFailedError:
        """A failure after its Retry-After is noted for the host: final when it asks for too much."""
        asked_s, most_s = error.retry_after_s, self._config.max_retry_wait_s
        if not error.may_pass or not asked_s:
            return error
        self._pauses.ask(host, asked_s, asked_s > most_s, error.status, error.http_status)
        if asked_s <= most_s:
            return error
        reason = f"{error.reason} with a Retry-After of {asked_s:.0f} s, over max_retry_wait_s ({most_s:g} s)"
        return FetchFailedError(error.status, reason, error.http_status)

    async def _timed(self, session: aiohttp.ClientSession, url: URL, trail: _Trail) -> bytes | URL:
        is_first = trail.left_s == self._config.total_timeout_s
        timeouts = self._whole if is_first else self._timeouts(trail.left_s)
        start = time.monotonic()
        try:
            return await self._ask(session, url, trail, timeouts)
        except aiohttp.ClientConnectorDNSError as error:  # what was resolved before has left the cache meanwhile
            raise no_address(url.raw_host or "", error.os_error) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise no_response(url.raw_host, error, trail.http_status) from error
        finally:
            trail.left_s -= time.monotonic() - start

    async def _ask(
        self, session: aiohttp.ClientSession, url: URL, trail: _Trail, timeout: aiohttp.ClientTimeout
    ) -> bytes | URL:
        headers = None if self._kept.keeps(url.raw_host or "") else {"Connection": "close"}
        async with session.get(url, allow_redirects=False, headers=headers, timeout=timeout) as response:
            status = trail.http_status = response.status
            kind = response.headers.get("Content-Type")
            trail.content_type = kind[:200] if kind else None
            if 300 <= status < 400:
                return _next_url(url, response)
            if status >= 400:
                raise self._heard(url.raw_host or "", bad_response(response))
            if self._config.respect_robots_tag and "X-Robots-Tag" in response.headers:
                said = refusal(response.headers.getall("X-Robots-Tag"), self._agents)
                if said:
                    raise FetchFailedError("robots", f"X-Robots-Tag: {said}", status)
            return await self._body(response)

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        cap, announced = self._config.max_bytes, response.content_length
        if announced is not None and announced > cap:
            raise FetchFailedError("too_large", f"{announced} bytes announced, over {cap}", response.status)
        inflater = Inflater.of(response)
        pieces: list[bytes] = []
        received = size = 0
        while piece := await response.content.readany():
            received += len(piece)
            if inflater is not None:
                piece = inflater.feed(piece, cap + 1 - size)
            pieces.append(piece)
            size += len(piece)
            if max(received, size) > cap:
                response.close()
                raise FetchFailedError("too_large", f"more than {cap} bytes", response.status)
        if inflater is not None:
            pieces.append(inflater.end())
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _timeouts(self, total_s: float) -> aiohttp.ClientTimeout:
        config = self._config
        return aiohttp.ClientTimeout(
            total=max(total_s, 0.001),  # 0 would mean none
            connect=config.connect_timeout_s,
            sock_read=config.first_byte_timeout_s,
        )


@functools.lru_cache(maxsize=4)
def _tls_context(ca_file: str) -> ssl.SSLContext:
    """One context a process and file: making one costs 20 ms of CPU."""
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(ca_file)
    except OSError as error:  # ssl.SSLError among them
        raise ValueError(
            f"ca_file {ca_file!r} cannot be read as PEM certificates ({error}); give the file of your mirror's authority"
        ) from error
    return context


def _next_url(url: URL, response: aiohttp.ClientResponse) -> URL:
    location = response.headers.get("Location")
    if not location:
        raise FetchFailedError("redirects", f"HTTP {response.status} without a Location", response.status)
    try:
        target = url.join(URL(location)).with_fragment(None)
        target = target.with_user(None) if target.host else target
    except ValueError as error:
        raise FetchFailedError("redirects", f"Location {location[:200]!r} is not a URL", response.status) from error
    if target.scheme not in ("http", "https") or not target.host:
        raise FetchFailedError("redirects", f"redirects to {location[:200]!r}, not http or https", response.status)
    return target
