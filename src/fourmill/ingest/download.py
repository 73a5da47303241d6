"""One URL to bytes or to the class of its failure: redirects, retries, limits and address checks around aiohttp."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Literal, Self
from weakref import WeakValueDictionary

import aiohttp
from yarl import URL

from fourmill.ingest.addresses import AddressPolicy, CheckedResolver, Lookup, RefusedAddressError
from fourmill.ingest.config import IngestConfig

FetchStatus = Literal[
    "ok",
    "dns",
    "refused_address",
    "connect",
    "timeout",
    "http_404",
    "http_4xx",
    "http_5xx",
    "too_large",
    "redirects",
    "truncated",
]

_CHUNK = 64 * 1024
_DNS_CACHE_S = 300


@dataclass(frozen=True)
class Fetched:
    """What became of one URL. `data` is the body when `status` is "ok", else empty."""

    status: FetchStatus
    reason: str | None
    data: bytes
    final_url: str  # after redirects, without credentials
    http_status: int | None  # of the last response, None when there was none
    attempts: int
    seconds: float  # in all, waits included


class _FailedError(Exception):
    def __init__(
        self,
        status: FetchStatus,
        reason: str,
        http_status: int | None = None,
        may_pass: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.status: FetchStatus = status
        self.reason = reason
        self.http_status = http_status
        self.may_pass = may_pass
        self.retry_after_s = retry_after_s


@dataclass
class _Trail:
    """How far one attempt got."""

    url: str
    http_status: int | None = None


class Downloader:
    """An HTTP client for one event loop: `async with Downloader(config, {}) as get: await get.fetch(url)`.

    Connections are kept alive and shared. Names are resolved by a resolver that answers with public addresses only
    (or any, for `allow_hosts`), so that what was checked is what is connected to, at every redirect. Environment
    proxies and cookies are not used. A connection that breaks before its response is asked once more by aiohttp itself,
    since a kept one may have gone stale; that does not count as an attempt.
    """

    def __init__(
        self,
        config: IngestConfig,
        connect_to: Mapping[str, str] | None = None,
        wait: Callable[[float], Awaitable[object]] = asyncio.sleep,
        lookup: Lookup | None = None,
    ) -> None:
        """Make a client; nothing is opened before `async with`.

        Args:
            config: limits, timeouts, retries, allowed hosts.
            connect_to: "host:port" of URLs to "address:port" to connect to instead, for hosts served on this machine;
                the host must be a name, not an address.
            wait: awaited with the seconds before a retry.
            lookup: host name to addresses, in place of the system's.
        """
        self._config = config
        self._policy = AddressPolicy(config.allow_hosts)
        self._connect_to = dict(connect_to or {})
        self._wait = wait
        self._lookup = lookup
        self._session: aiohttp.ClientSession | None = None
        self._gates: WeakValueDictionary[tuple[str | None, int | None], asyncio.Semaphore] = WeakValueDictionary()

    async def __aenter__(self) -> Self:
        config = self._config
        connector = aiohttp.TCPConnector(
            resolver=CheckedResolver(self._policy, self._connect_to, self._lookup),
            limit=config.concurrency,
            limit_per_host=config.per_host,
            ttl_dns_cache=_DNS_CACHE_S,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=config.total_timeout_s, connect=config.connect_timeout_s),
            # identity: an image gains nothing from compression, and the byte cap then counts what is held
            headers={"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def fetch(self, url: str) -> Fetched:
        """Download one URL. Never raises for what a URL or a server may do; the status says it."""
        start = time.monotonic()
        jitter = random.Random(url)  # enough chance: only URLs have to differ
        attempt, fetched = 0, None
        while fetched is None:
            attempt += 1
            trail = _Trail(url)
            try:
                data = await self._follow(trail)
                fetched = Fetched("ok", None, data, trail.url, trail.http_status, attempt, 0.0)
            except _FailedError as error:
                if error.may_pass and attempt <= self._config.retries:
                    await self._wait(self._pause_s(attempt, error.retry_after_s, jitter))
                    continue
                fetched = Fetched(error.status, error.reason, b"", trail.url, error.http_status, attempt, 0.0)
        return replace(fetched, seconds=round(time.monotonic() - start, 4))

    def _pause_s(self, attempt: int, retry_after_s: float | None, jitter: random.Random) -> float:
        pause = self._config.retry_wait_s * 2 ** (attempt - 1) * (0.5 + jitter.random())
        return min(max(pause, retry_after_s or 0.0), self._config.max_retry_wait_s)

    async def _follow(self, trail: _Trail) -> bytes:
        try:
            target = URL(trail.url)
            trail.url = str(target.with_user(None))
        except ValueError as error:
            raise _FailedError("dns", f"no host can be read from the URL: {error}") from error
        for _ in range(self._config.max_redirects + 1):
            answer = await self._request(target, trail)
            if isinstance(answer, bytes):
                return answer
            target, trail.url = answer, str(answer)
        raise _FailedError("redirects", f"more than {self._config.max_redirects} redirects", trail.http_status)

    async def _request(self, url: URL, trail: _Trail) -> bytes | URL:
        """One request: the body, or where it redirects to."""
        gate = self._gates.get((url.host, url.port))
        if gate is None:
            # aiohttp's own limit counts the wait for a free connection into the timeouts; this one comes before them
            gate = self._gates[url.host, url.port] = asyncio.Semaphore(self._config.per_host)
        trail.http_status = None
        try:
            self._policy.check_literal(url.host or "")
            async with gate:
                return await self._ask(url, trail)
        except RefusedAddressError as error:
            raise _FailedError("refused_address", str(error)) from error
        except aiohttp.ClientConnectorDNSError as error:
            if isinstance(error.os_error, RefusedAddressError):
                raise _FailedError("refused_address", str(error.os_error)) from error
            raise _FailedError("dns", f"{url.host}: {error.os_error.strerror or error.os_error}") from error
        except TimeoutError as error:
            raise _FailedError("timeout", f"{url.host} took too long", trail.http_status, may_pass=True) from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise _FailedError("connect", f"{url.host}: certificate: {error.certificate_error}") from error
        except aiohttp.ClientPayloadError as error:
            raise _FailedError("truncated", f"the body ended early: {_said(error)}", trail.http_status) from error
        except aiohttp.InvalidURL as error:
            raise _FailedError("dns", f"not a host to connect to: {url.host!r}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _FailedError("connect", f"{url.host}: {_said(error)}", trail.http_status, may_pass=True) from error
        except ValueError as error:  # host names that no encoding takes
            raise _FailedError("dns", f"{url.host!r}: {_said(error)}") from error

    async def _ask(self, url: URL, trail: _Trail) -> bytes | URL:
        if self._session is None:
            raise RuntimeError("use the Downloader inside `async with`")
        async with self._session.get(url, allow_redirects=False) as response:
            status = trail.http_status = response.status
            if 300 <= status < 400:
                return _next_url(url, response)
            if status >= 400:
                raise _http_failure(response)
            cap = self._config.max_bytes
            if (response.content_length or 0) > cap:
                raise _FailedError("too_large", f"{response.content_length} bytes announced, over {cap}", status)
            body = bytearray()
            async for chunk in response.content.iter_chunked(_CHUNK):
                body += chunk
                if len(body) > cap:
                    response.close()
                    raise _FailedError("too_large", f"more than {cap} bytes", status)
            return bytes(body)


def _next_url(url: URL, response: aiohttp.ClientResponse) -> URL:
    location = response.headers.get("Location")
    if not location:
        raise _FailedError("redirects", f"HTTP {response.status} without a Location", response.status)
    try:
        target = url.join(URL(location)).with_fragment(None)
        target = target.with_user(None) if target.host else target
    except ValueError as error:
        raise _FailedError("redirects", f"Location {location[:200]!r} is not a URL", response.status) from error
    if target.scheme not in ("http", "https") or not target.host:
        raise _FailedError("redirects", f"redirects to {location[:200]!r}, not http or https", response.status)
    return target


def _http_failure(response: aiohttp.ClientResponse) -> _FailedError:
    status, reason = response.status, f"HTTP {response.status}"
    if status == 404:
        return _FailedError("http_404", reason, status)
    if status >= 500:
        return _FailedError("http_5xx", reason, status, True, _retry_after_s(response))
    return _FailedError("http_4xx", reason, status, status == 429, _retry_after_s(response))


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        asked = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if asked.tzinfo is None:
        asked = asked.replace(tzinfo=UTC)
    return max(0.0, (asked - datetime.now(UTC)).total_seconds())


def _said(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:200]
