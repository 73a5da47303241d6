"""Rows of a list: one line of a TSV to a URL and a caption, or to the reason why not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

MAX_URL_CHARS = 2000
MAX_LINE_BYTES = 1024**2  # of a line that is kept; the rest of a longer one is passed over
_KEPT_CHARS = 2000  # of a bad row's text
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class ListRow:
    """One row of the list. A bad row keeps what can be shown of its text in `url`, and says why in `reason`."""

    url: str
    caption: str
    reason: str | None = None

    @property
    def status(self) -> str:
        return "ok" if self.reason is None else "bad_row"

    @property
    def host(self) -> str:
        """Host of a good row's URL, lower case."""
        return urlsplit(self.url).hostname or ""


def parse_row(line: bytes) -> ListRow:
    """Read one line, with or without its line end. Never raises: a line that is no row comes back with a reason."""
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    shown = line[: 4 * _KEPT_CHARS].decode(errors="backslashreplace")[:_KEPT_CHARS]
    if len(line) > MAX_LINE_BYTES:
        return ListRow(shown, "", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        columns = line.decode().split("\t")
    except UnicodeDecodeError as error:
        return ListRow(shown, "", f"not UTF-8 at byte {error.start}")
    if len(columns) != 2:
        return ListRow(shown, "", f"{len(columns)} column(s), expected 2: URL<TAB>caption")
    url, caption = columns[0].strip(" "), columns[1].strip()
    reason = _url_fault(url)
    return ListRow(url if reason is None else url[:_KEPT_CHARS], caption, reason)


def iterate_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a list with their line ends, one a row; a byte order mark is dropped and very long lines are cut."""
    first = True
    while line := file.readline(MAX_LINE_BYTES + 2):
        end = line
        while len(end) == MAX_LINE_BYTES + 2 and not end.endswith(b"\n"):
            end = file.readline(MAX_LINE_BYTES + 2)
        yield line.removeprefix(b"\xef\xbb\xbf") if first else line
        first = False


def open_list(path: str) -> BinaryIO:
    """Open a list for reading.

    Raises:
        ValueError: it is missing, a folder, or empty, with the next step.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"the list {path!r} is a folder; give the TSV file in it (URL<TAB>caption a row)")
    try:
        if file.stat().st_size == 0:
            raise ValueError(f"the list {path!r} is empty; it takes one row of URL<TAB>caption a picture")
        return file.open("rb")
    except FileNotFoundError:
        raise ValueError(f"no list at {path!r}; give the path of a TSV file with URL<TAB>caption a row") from None
    except OSError as error:
        raise ValueError(
            f"the list {path!r} cannot be read ({error.strerror}); mend its rights or copy it elsewhere"
        ) from error


def count_rows(path: str) -> int:
    """Rows of a list, good and bad: what the blocks have to hold.

    Raises:
        ValueError: it is missing, a folder, or empty.
    """
    with open_list(path) as file:
        return sum(1 for _ in iterate_lines(file))


def _url_fault(url: str) -> str | None:
    if not url:
        return "the URL is empty"
    if len(url) > MAX_URL_CHARS:
        return f"the URL is {len(url)} characters long, over {MAX_URL_CHARS}"
    if _CONTROL.search(url):
        return "the URL holds a control character"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # both raise on nonsense
    except ValueError as error:
        return f"not a URL: {error}"
    if parts.scheme not in ("http", "https"):
        return f"scheme {parts.scheme[:40]!r}, expected http or https"
    return None if host else "the URL names no host"
