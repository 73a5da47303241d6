"""Which images a finished block holds: their sha256, sorted, in buckets, to be looked up by other blocks.

`{dataset}/{split}/_ledger/images/block_03.digests`, a file a split, beside the block's ledger:

    offset  bytes
         0     16  "fourmill sha256" and a line feed
        16   2048  256 numbers, u64 little-endian: the images whose sha256 begins with byte 0, 1, ... 255
      2064   40 n  an image each: its sha256 (32 bytes), its row in the list (u64 little-endian); ascending

Only images that are in the tars count: no duplicates, no failures. The file is written whole, after the block's
duplicates are marked. It may be trusted when the block's ledger is there: the ledger is taken away before a shard of the
block is changed, and comes back after the index. A block with a ledger and no index is given one from its rows.

At 10^9 rows in 99 blocks an index is 400 MB and a bucket 1.6 MB; all of them are 40 GB. At CC12M's 62 blocks of 200,000
rows an index is 8 MB and a bucket 31 kB.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core.ledger import ledger_path
from fourmill.core.modality import IMAGES
from fourmill.core.names import SPLITS, Layout, Split
from fourmill.core.shards import ShardPlace, read_receipt, read_rows
from fourmill.core.store import Store

FOLDER = IMAGES
RECORD = np.dtype([("sha256", "S32"), ("row", "<u8")])  # S32 drops zeros at the end and compares as if they were there

_MAGIC = b"fourmill sha256\n"
_BUCKETS = 256

Records = NDArray[np.void]
"""(N,) of `RECORD`."""


def index_path(dataset: str, split: Split, block: str) -> str:
    """Where a block's index is."""
    return ledger_path(dataset, split, FOLDER, block).replace(".parquet", ".digests")


def read_images(store: Store, place: ShardPlace) -> tuple[Records, Records]:
    """The images of a shard and its marked duplicates, in row order; none of a shard that is not done."""
    if read_receipt(store, place) is None or not store.exists(place.rows):
        return _records([]), _records([])
    rows = read_rows(store, place)
    columns = [rows[name].to_pylist() for name in ("key", "status", "sha256")]
    found: dict[str, list[tuple[bytes, int]]] = {"ok": [], "duplicate": []}
    for key, status, sha256 in zip(*columns, strict=True):
        if status in found:
            found[status].append((bytes.fromhex(sha256), int(key)))
    return _records(found["ok"]), _records(found["duplicate"])


def images_of(store: Store, places: Iterable[ShardPlace]) -> Records:
    """The images of several shards, in their order."""
    return np.concatenate([_records([]), *(read_images(store, place)[0] for place in places)])


def write_index(store: Store, dataset: str, layout: Layout, block: str) -> None:
    """Publish the index of a block whose shards are done; a file that is right already is left alone."""
    for split in SPLITS:
        places = (ShardPlace(dataset, split, FOLDER, shard) for shard in layout.shards_of(block))
        records = sort_records(images_of(store, places))
        counts = np.bincount(_first_bytes(records), minlength=_BUCKETS).astype("<u8")
        data = _MAGIC + counts.tobytes() + records.tobytes()
        path = index_path(dataset, split, block)
        if not store.exists(path) or store.read(path) != data:
            store.write(path, data)


def buckets(store: Store, dataset: str, split: Split, block: str) -> Iterator[Records]:
    """The buckets of a block's index that hold anything, one after another, each sorted by sha256.

    The file is read as a stream, so a store without seeking serves as well.

    Raises:
        FileNotFoundError: the block has no index.
        ValueError: the file is not whole.
    """
    path = index_path(dataset, split, block)
    with store.open(path) as stream:
        head = _read(stream, len(_MAGIC) + 8 * _BUCKETS, path)
        if not head.startswith(_MAGIC):
            raise ValueError(f"{path} is no index of digests; delete it and materialize {dataset}/images for {block}")
        for count in np.frombuffer(head, "<u8", offset=len(_MAGIC)).tolist():
            if count:
                yield np.frombuffer(_read(stream, count * RECORD.itemsize, path), RECORD)


def has_ledger(store: Store, dataset: str, block: str) -> bool:
    """Whether a block is finished and has passed its checks."""
    return all(store.exists(ledger_path(dataset, split, FOLDER, block)) for split in SPLITS)


def has_index(store: Store, dataset: str, block: str) -> bool:
    """Whether a block has published its digests, finished or about to be."""
    return all(store.exists(index_path(dataset, split, block)) for split in SPLITS)


def sort_records(records: Records) -> Records:
    """By sha256, then by row."""
    return records[np.lexsort((records["row"], records["sha256"]))]


def find(sorted_digests: NDArray[Any], records: Records) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each record's sha256 is among sorted digests, and whether it is there at all."""
    at = np.searchsorted(sorted_digests, records["sha256"])
    inside = at < len(sorted_digests)
    at[~inside] = 0
    return at, inside & (sorted_digests[at] == records["sha256"]) if len(sorted_digests) else inside


def _records(images: list[tuple[bytes, int]]) -> Records:
    return np.array(images, RECORD)


def _first_bytes(records: Records) -> NDArray[np.uint8]:
    raw = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), RECORD.itemsize)
    return raw[:, 0]


def _read(stream: Any, size: int, path: str) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = stream.read(size - len(data))
        if not more:
            raise ValueError(f"{path} ends early; delete it and materialize its block's images again")
        data += more
    return bytes(data)
