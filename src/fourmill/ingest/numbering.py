"""Rows get their numbers, their split, and a mark when an earlier row has the same URL: by hashes, a batch at a time."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow makes the functions of pyarrow.compute when it is imported)

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fourmill.core.names import sample_key

SOURCE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("split", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("url_duplicate_of", pa.string()),
        ("origin", pa.string()),
    ]
)
_NONE = np.iinfo(np.int64).max


def url_hashes(url: pa.StringArray) -> np.ndarray:
    """The first 16 bytes of each URL's sha256 as (N, 2) uint64: the first decides the split, as in `names.split_of`."""
    digests = b"".join([hashlib.sha256(data).digest()[:16] for data in url.cast(pa.binary()).to_pylist()])
    return np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 2)


def repeated_hashes(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """Hashes that occur more than once, ascending, each once."""
    ordered = np.concatenate([np.empty(0, np.uint64), *hashes])
    ordered.sort()
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


class Numberer:
    """Numbers rows in their order.

    Two rows have the same URL when 128 bits of its sha256 are the same. Of the URLs that the first 64 bits call
    repeated, the first row and the other 64 bits are held.
    """

    def __init__(self, val_fraction: float, repeated: np.ndarray) -> None:
        self._val_fraction = val_fraction
        self._repeated = repeated
        self._first = np.full(len(repeated), _NONE, np.int64)
        self._other = np.zeros(len(repeated), np.uint64)
        self._next = 0

    def number(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """A batch of `listing.ROWS` as `SOURCE_SCHEMA`."""
        numbers = np.arange(self._next, self._next + rows.num_rows, dtype=np.int64)
        self._next += rows.num_rows
        hashes = url_hashes(rows["url"])
        in_val = hashes[:, 0].astype(np.float64) / 2.0**64 < self._val_fraction
        good = pc.is_null(rows["reason"])
        columns = [
            pa.array(numbers),
            rows["url"],
            rows["caption"],
            pc.if_else(pa.array(in_val), "val", "train"),
            pc.if_else(good, "ok", "bad_row"),
            rows["reason"],
            self._duplicates(numbers, hashes, good.to_numpy(zero_copy_only=False)),
            rows["origin"],
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SOURCE_SCHEMA)

    def _duplicates(self, numbers: np.ndarray, hashes: np.ndarray, good: np.ndarray) -> pa.Array:
        if not len(self._repeated):
            return pa.nulls(len(numbers), pa.string())
        place = np.minimum(np.searchsorted(self._repeated, hashes[:, 0]), len(self._repeated) - 1)
        rows = np.flatnonzero(good & (self._repeated[place] == hashes[:, 0]))
        places = place[rows]
        np.minimum.at(self._first, places, numbers[rows])
        first = self._first[places]
        is_first = first == numbers[rows]
        self._other[places[is_first]] = hashes[rows[is_first], 1]
        marked = ~is_first & (self._other[places] == hashes[rows, 1])
        keys: list[str | None] = [None] * len(numbers)
        for row, number in zip(rows[marked].tolist(), first[marked].tolist(), strict=True):
            keys[row] = sample_key(number)
        return pa.array(keys, pa.string())
