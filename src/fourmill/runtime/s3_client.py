"""The connection to S3: one client a process, patience while the store is away, and errors with the next step.

Endpoint, region and credentials come from where boto3 looks for them: `AWS_ENDPOINT_URL_S3`, `AWS_REGION`,
`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, a profile, or the role of the machine.
"""

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from fourmill.core.store import StoreError, StoreFullError

PATIENCE_S = 120.0
"""A store may be away this long; what is asked of it meanwhile is asked again."""

AWAY = (
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
"""Errors of a connection, which pass. A certificate that does not fit is none of them."""

_T = TypeVar("_T")
_LONGEST_WAIT_S = 10.0
_PASSING_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "InternalError"}
_LASTING_STATUSES = {501, 505, 507}  # not implemented, HTTP version, no room
_MISSING_CODES = {"NoSuchKey", "404"}
_FULL_CODES = {"XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507"}
_KEY_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthorizationHeaderMalformed",
}


def make_client(attempts: int = 8, read_timeout_s: float = 60) -> Any:
    """An S3 client; costs a tenth of a second or two."""
    settings = Config(
        retries={"mode": "adaptive", "max_attempts": attempts},
        connect_timeout=5,
        read_timeout=read_timeout_s,
        tcp_keepalive=True,
        max_pool_connections=16,
    )
    # A session of its own: boto3's shared one must not be used by several threads while it makes clients.
    return Session().client("s3", config=settings)


class _Process:
    client: Any = None
    lock = threading.Lock()


def process_client() -> Any:
    """The client of this process, for all its threads; made when it is first asked for."""
    with _Process.lock:
        if _Process.client is None:
            _Process.client = make_client()
        return _Process.client


def forget_client() -> None:
    """Make a new client when one is next asked for: after a fork (sockets cannot be shared), or for another endpoint."""
    _Process.client, _Process.lock = None, threading.Lock()


os.register_at_fork(after_in_child=forget_client)


def ask(where: str, operation: Callable[[], _T], patience_s: float = PATIENCE_S) -> _T:
    """Do something with S3, again and again while the store is away.

    Args:
        where: the `s3://` URL that it is about, for errors.

    Raises:
        FileNotFoundError: there is no such object.
        StoreFullError: the store has no room.
        StoreError: anything else that waiting does not mend, or did not within `patience_s`.
    """
    start, wait_s = time.monotonic(), 0.5
    while True:
        try:
            return operation()
        except (BotoCoreError, ClientError) as error:
            away_s = time.monotonic() - start
            if not _passes(error) or away_s >= patience_s:
                raise _explained(where, error, away_s) from error
        time.sleep(wait_s * random.uniform(0.5, 1.0))
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def error_code(error: Exception) -> str:
    """S3's word for an error; empty when the error is not S3's."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _status(error: Exception) -> int:
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _passes(error: Exception) -> bool:
    status = _status(error)
    if isinstance(error, AWAY) or error_code(error) in _PASSING_CODES or status == 429:
        return True
    return status >= 500 and status not in _LASTING_STATUSES


def _explained(where: str, error: Exception, away_s: float) -> OSError:
    """The error as the rest of the package knows it."""
    code, bucket = error_code(error), where.removeprefix("s3://").partition("/")[0]
    if code in _MISSING_CODES:
        return FileNotFoundError(errno.ENOENT, "no such object", where)
    if code in _FULL_CODES or _status(error) == 507:
        return StoreFullError(f"no room for {where} ({error}); free some there, or choose another store")
    if code == "NoSuchBucket":
        return StoreError(f"{where}: there is no bucket {bucket!r}; create it, or mend the store's root")
    if code == "NoSuchUpload":
        return StoreError(f"{where}: the store lost what was uploaded of it so far; run again, it is made anew")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StoreError(
            f"{where}: no credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
            "here and on every node that works on shards"
        )
    if code in _KEY_CODES:
        return StoreError(f"{where}: the credentials are refused ({error}); look at AWS_ACCESS_KEY_ID and the clock")
    if _status(error) == 403:
        return StoreError(
            f"{where}: not allowed ({error}); grant GetObject, PutObject, DeleteObject and AbortMultipartUpload on "
            f"the objects and ListBucket on {bucket!r}"
        )
    if _status(error) == 412:
        return StoreError(f"{where} was replaced while it was read; read it again")
    if _passes(error):
        return StoreError(
            f"{where}: no answer for {away_s:.0f} s ({error}); see that the store runs and that AWS_ENDPOINT_URL_S3 "
            "names it, then run again: what was finished stays"
        )
    return StoreError(f"{where}: {error}")
