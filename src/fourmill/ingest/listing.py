"""Rows of a source as columns, and what makes one a bad row: a batch at a time, since a list has millions.

Formats and places are not known here: `list_text`, `list_parquet` and the `at_hand` modules read them.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow makes the functions of pyarrow.compute when it is imported)

import hashlib
import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_URL_CHARS = 2000
MAX_CAPTION_CHARS = 100_000  # also what Python's CSV reader takes as a field, less a margin
BATCH_ROWS = 4096
ROWS = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("host", pa.string()),
        ("reason", pa.string()),
        ("origin", pa.string()),
    ]
)
"""A batch of rows: `reason` is null for a good row and says what is wrong with a bad one; `host` is null for those.

A bad row keeps what can be shown of it in `url` and `caption`. `origin` is where a picture at hand was once downloaded
from, as far as its source says so.
"""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Surely good, and by far the most. What does not match is looked at one by one.
_PLAIN_URL = r"\Ahttps?://(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,252})(?::[0-9]{1,4})?(?:[/?#][^\x00-\x1f\x7f]*)?\z"


def url_rows(url: pa.Array, caption: pa.Array, faults: Mapping[int, str] | None = None) -> pa.RecordBatch:
    """A batch of `ROWS` from a list's columns.

    Args:
        url, caption: strings or bytes; spaces around a URL and white space around a caption are dropped.
        faults: reasons of rows that the reader knows to be bad, by position.
    """
    reasons = dict(faults or {})
    url, caption = _texts(url, caption, reasons)
    url = pc.utf8_trim(url, characters=" ")
    host = pc.struct_field(pc.extract_regex(url, _PLAIN_URL), "host")
    plain = pc.and_(pc.is_valid(host), pc.less_equal(pc.utf8_length(url), MAX_URL_CHARS))
    hosts: dict[int, str] = {}
    for row in _positions(pc.invert(plain)):
        text = url[row].as_py()
        fault = reasons.get(row) or url_fault(text)
        if fault:
            reasons[row] = fault
        else:
            hosts[row] = urlsplit(text).hostname or ""
    return _batch(url, caption, _replaced(pc.ascii_lower(host), hosts), reasons)


def at_hand_rows(
    urls: Sequence[str],
    captions: Sequence[bytes],
    places: Sequence[str],
    faults: Mapping[int, str],
    origins: Sequence[str | None] | None = None,
) -> pa.RecordBatch:
    """A batch of `ROWS` of pictures at hand.

    Args:
        urls: as `at_hand` makes them.
        places: what stands for a host in tables: the folder or tar that a picture lies in.
        faults: reasons of bad rows, by position.
        origins: URLs that the pictures were downloaded from; None where no row has one.
    """
    reasons = dict(faults)
    url, caption = _texts(pa.array(urls, pa.string()), pa.array(captions, pa.binary()), reasons)
    for row in _positions(pc.greater(pc.utf8_length(url), MAX_URL_CHARS)):
        reasons.setdefault(row, f"its address is over {MAX_URL_CHARS} characters long; shorten the folder's names")
    origin = None if origins is None else pa.array(origins, pa.string())
    return _batch(url, caption, pa.array(places, pa.string()), reasons, origin)


def url_fault(url: str) -> str | None:
    """What is wrong with a URL, None if it may be fetched."""
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


class RowsDigest:
    """Digest of columns of strings: the same rows give the same digest, however they are cut into batches."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in columns}

    def update(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Take in the rows that follow."""
        for batch in rows.to_batches() if isinstance(rows, pa.Table) else [rows]:
            for name, (lengths, texts) in self._columns.items():
                column = batch.column(name)
                lengths.update(pc.fill_null(pc.binary_length(column), -1).to_numpy().astype("<i4"))
                texts.update(_value_bytes(pc.fill_null(column, "")))

    def hexdigest(self) -> str:
        """64 hex digits."""
        return hashlib.sha256(b"".join(sha.digest() for pair in self._columns.values() for sha in pair)).hexdigest()


def _value_bytes(column: pa.StringArray) -> memoryview:
    _, offsets, values = column.buffers()
    if values is None or not len(column):
        return memoryview(b"")
    ends = np.frombuffer(offsets, np.int32)[[column.offset, column.offset + len(column)]].tolist()
    return memoryview(values)[ends[0] : ends[1]]


def _texts(url: pa.Array, caption: pa.Array, reasons: dict[int, str]) -> tuple[pa.StringArray, pa.StringArray]:
    url, caption = _text(url, "URL", reasons), _text(caption, "caption", reasons)
    caption = pc.utf8_trim_whitespace(caption)
    for row in _positions(pc.greater(pc.utf8_length(caption), MAX_CAPTION_CHARS)):
        reasons.setdefault(row, f"the caption is over {MAX_CAPTION_CHARS} characters long")
    return url, caption


def _text(column: pa.Array, name: str, reasons: dict[int, str]) -> pa.StringArray:
    """A column as valid UTF-8 without nulls; rows that were neither get a reason."""
    for row in _positions(pc.is_null(column)) if column.null_count else ():
        reasons.setdefault(row, f"the {name} is null")
    try:
        return pc.fill_null(column.cast(pa.binary()).cast(pa.string()), "")
    except pa.ArrowInvalid:  # not UTF-8 somewhere: find where
        texts: list[str] = []
        for row, data in enumerate(column.cast(pa.binary()).to_pylist()):
            try:
                texts.append((data or b"").decode())
            except UnicodeDecodeError as error:
                texts.append(data.decode(errors="backslashreplace"))
                reasons.setdefault(row, f"the {name} is not UTF-8 at byte {error.start}")
        return pa.array(texts, pa.string())


def _batch(
    url: pa.Array, caption: pa.Array, host: pa.Array, reasons: Mapping[int, str], origin: pa.Array | None = None
) -> pa.RecordBatch:
    url = _replaced(url, {row: url[row].as_py()[:MAX_URL_CHARS] for row in reasons})
    caption = _replaced(caption, {row: caption[row].as_py()[:MAX_CAPTION_CHARS] for row in reasons})
    host = _replaced(host, dict.fromkeys(reasons))
    reason = _replaced(pa.nulls(len(url), pa.string()), reasons)
    origin = pa.nulls(len(url), pa.string()) if origin is None else origin
    return pa.RecordBatch.from_arrays([url, caption, host, reason, origin], schema=ROWS)


def _replaced(column: pa.Array, values: Mapping[int, str | None]) -> pa.Array:
    if not values:
        return column
    mask = np.zeros(len(column), bool)
    mask[list(values)] = True
    return pc.replace_with_mask(column, mask, pa.array([values[row] for row in sorted(values)], pa.string()))


def _positions(mask: pa.BooleanArray) -> list[int]:
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist()
