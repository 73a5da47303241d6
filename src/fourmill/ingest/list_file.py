"""The list as a local file, wherever it lies: a path, https://, or a root that `core.store` opens (s3://).

A remote list is copied to a temporary file first, since it is read twice and Parquet is read from its end. The list is
named by whoever runs the project, so its host is not held to the rules for the addresses in it.
"""

import http.client
import shutil
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import BinaryIO

from fourmill.core.digest import Json, digest_json
from fourmill.core.store import open_store
from fourmill.ingest.config import SourceConfig, shown_place

RETRY_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each further attempt that brought nothing new
_TIMEOUT_S = 60.0  # without a byte
_CHUNK_BYTES = 1024**2
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
_AGENT = {"User-Agent": "fourmill/0.1 (image dataset builder)"}


class _PassingError(Exception):
    """An attempt that failed and may pass."""


@contextmanager
def local_list(place: str, retry_waits_s: Sequence[float] = RETRY_WAITS_S) -> Iterator[Path]:
    """The list as a file on this machine, while the block runs.

    A download that breaks off is taken up where it stopped, if the server knows ranges and the file did not change.

    Raises:
        ValueError: it is missing, a folder, empty, cannot be read or fetched, or does not fit the temporary folder.
    """
    if "://" not in place or place.startswith("file://"):
        yield _checked(Path(place.removeprefix("file://")), place)
        return
    with tempfile.TemporaryDirectory(prefix="fourmill-list-") as folder:
        target = Path(folder) / "list"
        try:
            with target.open("wb") as file:
                if place.startswith(("https://", "http://")):
                    _download(place, file, retry_waits_s)
                else:
                    _copy(place, file)
        except OSError as error:
            raise ValueError(
                f"the list {shown_place(place)!r} cannot be copied to {folder} ({error.strerror or error}); "
                "make room there, or name another folder in TMPDIR"
            ) from error
        yield _checked(target, shown_place(place))


def list_stamp(config: SourceConfig) -> str | None:
    """What tells that a list is still the one that was read, without reading it; "" where nothing does.

    A file's size and time of change; an object's size and ETag; a server's ETag or Last-Modified, with the length. None
    when the server cannot be asked now.

    Raises:
        ValueError: the list is missing.
    """
    place = config.list
    if place.startswith(("https://", "http://")):
        try:
            facts = _remote_facts(place)
        except _BROKEN:
            return None
    elif "://" in place and not place.startswith("file://"):
        facts = _stored_facts(place)
    else:
        stat = _checked(Path(place.removeprefix("file://")), place).stat()
        facts = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    return digest_json([config.model_dump(mode="json"), facts]) if facts else ""


def _checked(path: Path, shown: str) -> Path:
    if path.is_dir():
        raise ValueError(f"the list {shown!r} is a folder; give the TSV, CSV or Parquet file in it")
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"the list {shown!r} is empty; it takes one row of URL<TAB>caption a picture")
        with path.open("rb"):
            return path
    except FileNotFoundError:
        raise ValueError(f"no list at {shown!r}; give the path of a TSV file with URL<TAB>caption a row") from None
    except OSError as error:
        raise ValueError(
            f"the list {shown!r} cannot be read ({error.strerror}); mend its rights or copy it elsewhere"
        ) from error


def _copy(place: str, file: BinaryIO) -> None:
    folder, _, name = place.rpartition("/")
    try:
        with open_store(folder).open(name) as source:
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
    except FileNotFoundError:
        raise _no_list(place) from None


def _stored_facts(place: str) -> list[Json]:
    folder, _, name = place.rpartition("/")
    try:
        return [*open_store(folder).stamp(name)]
    except FileNotFoundError:
        raise _no_list(place) from None


def _no_list(place: str) -> ValueError:
    return ValueError(f"no list at {place!r}; give the address of a TSV, CSV or Parquet file")


def _download(url: str, file: BinaryIO, retry_waits_s: Sequence[float]) -> None:
    download, furthest, failures = _Download(url, file), 0, 0
    while True:
        try:
            download.attempt()
            return
        except _PassingError as error:
            failures = 0 if file.tell() > furthest else failures
            furthest = max(furthest, file.tell())
            if failures >= len(retry_waits_s):
                raise ValueError(
                    f"the list {shown_place(url)!r} cannot be fetched ({error}), {failures + 1} attempts in a row; "
                    "try again later, or fetch it by hand and give its path"
                ) from error
            time.sleep(retry_waits_s[failures])
            failures += 1


class _Download:
    """A download that may be taken up again; the file holds what has come."""

    def __init__(self, url: str, file: BinaryIO) -> None:
        self._url = url
        self._file = file
        self._validator = ""  # of what the file holds; "" when the server gave none, then it starts from the beginning

    def attempt(self) -> None:
        """Append what is missing. Raises _PassingError, ValueError for what will not pass, OSError of the disk."""
        start = self._file.tell() if self._validator else 0
        headers = {**_AGENT, "Range": f"bytes={start}-", "If-Range": self._validator} if start else _AGENT
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self._url, headers=headers), timeout=_TIMEOUT_S
            ) as answer:
                goes_on = answer.status == 206 and str(answer.headers["Content-Range"]).startswith(f"bytes {start}-")
                self._receive(answer, start if goes_on else 0)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                self._validator = ""
            if error.code in (416, 429) or error.code >= 500:
                raise _PassingError(f"HTTP {error.code}") from error
            raise ValueError(
                f"the list {shown_place(self._url)!r} cannot be fetched: HTTP {error.code}; mend its URL"
            ) from error
        except _BROKEN as error:
            raise _PassingError(str(error) or type(error).__name__) from error

    def _receive(self, answer: http.client.HTTPResponse, start: int) -> None:
        self._file.seek(start)
        self._file.truncate()
        self._validator = _validator(answer.headers)
        length = answer.length
        while chunk := answer.read(_CHUNK_BYTES):
            self._file.write(chunk)
        if length is not None and self._file.tell() - start < length:
            raise _PassingError(f"the answer breaks off after {self._file.tell() - start} of {length} bytes")


def _validator(headers: Message) -> str:
    """What If-Range takes: a strong ETag, else the time of change; "" if the server says neither."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _remote_facts(url: str) -> list[Json] | None:
    request = urllib.request.Request(url, headers=_AGENT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            said = [answer.headers.get(name) for name in ("ETag", "Last-Modified", "Content-Length")]
    except urllib.error.HTTPError as error:  # no HEAD here, or not with this signature
        error.close()
        return None
    return said if said[0] or said[1] else None
