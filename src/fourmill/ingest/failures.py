"""What can become of a request: the closed set of classes, and which exception or response falls into which."""

import errno
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp

from fourmill.ingest.addresses import RefusedAddressError
from fourmill.ingest.resolver import is_temporary
from fourmill.ingest.statuses import FetchStatus


class FetchFailedError(Exception):
    """One attempt that came to nothing: its class, a sentence, and whether the next one may fare better."""

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


def no_address(host: str, error: OSError) -> FetchFailedError:
    """The failure of a lookup."""
    if isinstance(error, RefusedAddressError):
        return FetchFailedError("refused_address", str(error))
    if isinstance(error, TimeoutError):
        return FetchFailedError("timeout", str(error), may_pass=True)
    return FetchFailedError("dns", f"{host}: {error.strerror or error}", may_pass=is_temporary(error))


def no_response(host: str | None, error: Exception, http_status: int | None) -> FetchFailedError:
    """The failure of a request that raised, before its response or within its body.

    Raises:
        OSError: this machine is at fault, not the host.
    """
    if isinstance(error, TimeoutError):
        return FetchFailedError("timeout", f"{host}: {_said(error)}", http_status, may_pass=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        was_reset = "ConnectionResetError" in str(error)  # aiohttp keeps the cause as text only
        return FetchFailedError("truncated", f"the body ended early: {_said(error)}", http_status, was_reset)
    if isinstance(error, aiohttp.ClientSSLError):
        return FetchFailedError("connect", f"{host}: TLS: {_said(error)}")
    if isinstance(error, aiohttp.InvalidURL):
        return FetchFailedError("dns", f"not a host to connect to: {host!r}")
    if isinstance(error, aiohttp.ClientResponseError):
        if _goes_on_after_its_end(error):
            return FetchFailedError("truncated", "the body is longer than its Content-Length says", http_status)
        return FetchFailedError("connect", f"{host}: not an HTTP response: {_said(error)}", http_status)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise OSError(error.errno, "too many open files: raise the limit (ulimit -n) or lower `concurrency`") from error
    if isinstance(error, (aiohttp.ClientError, OSError)):
        return FetchFailedError("connect", f"{host}: {_said(error)}", http_status, may_pass=True)
    return FetchFailedError("dns", f"{host!r}: {_said(error)}")  # ValueError: host names that no encoding takes


def bad_response(response: aiohttp.ClientResponse) -> FetchFailedError:
    """The failure that a status of 400 and above states."""
    status, reason = response.status, f"HTTP {response.status}"
    if status == 404:
        return FetchFailedError("http_404", reason, status)
    if status >= 500:
        return FetchFailedError("http_5xx", reason, status, True, _retry_after_s(response))
    return FetchFailedError("http_4xx", reason, status, status == 429, _retry_after_s(response))


def _goes_on_after_its_end(error: aiohttp.ClientResponseError) -> bool:
    """Whether a whole response was followed by bytes that are none. When they arrive in one packet aiohttp drops the
    response and only its message tells: the place of the fault, under the quoted bytes, is not their beginning.
    """
    kind, place = error.message.partition(":")[0], error.message.rpartition("\n")[2]
    return kind.startswith("Data after") or (kind == "Bad status line" and place.find("^") > len("  b'"))


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
