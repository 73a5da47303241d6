"""Exact duplicates: of all rows whose stored images have the same bytes, the first keeps its image.

The method, for a data set of any size: each finished block publishes the sha256 of its images, sorted and cut into 256
buckets by the first byte (`digest_index.py`). A block that finishes holds its own digests, sorted, and reads the indexes
of the blocks before it one bucket at a time, as streams; each bucket is looked up by binary search.

Memory: 40 bytes a row of this block, three times while they are sorted, and one bucket of one other block. Reading: the
40 bytes an image of every earlier block.

                     rows/block   own digests   a bucket   read by the last block   by all blocks together
    CC12M, 62 blocks    200,000         24 MB     31 kB                    0.5 GB                    15 GB
    10^9 rows, 99          10^7        1.2 GB    1.6 MB                     40 GB                   2.0 TB

So it grows with the block, not with the data set. At 10^9 rows the last block reads for 80 s at 500 MB/s and looks up
10^9 digests, at 0.15 us each (measured among 200,000; more among 10^7): minutes, beside days of downloading.

Blocks may be made in any order, and an earlier one may gain images later (a top-up, a row that left the opt-out list).
Then later blocks hold copies that they could not know of. `copies_elsewhere` names those blocks; materialized again,
they download nothing and run this pass only.
"""

from collections import Counter
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fourmill.core.ledger import ledger_path
from fourmill.core.names import SPLITS, Layout, sample_key
from fourmill.core.shards import ROW_SCHEMA, Receipt, ShardPlace, need, places_of, read_rows, write_receipt, write_shard
from fourmill.core.store import Store
from fourmill.core.tar import TarError
from fourmill.ingest.digest_index import (
    FOLDER,
    Records,
    buckets,
    find,
    has_index,
    has_ledger,
    images_of,
    read_images,
    sort_records,
    write_index,
)
from fourmill.ingest.kept import Members, item_of
from fourmill.ingest.statuses import STATUSES

_NONE = np.iinfo(np.uint64).max  # row of no image


def finish_block(store: Store, dataset: str, layout: Layout, block: str) -> None:
    """Mark a block's duplicates and publish its index, once its shards are done and before its ledger is written.

    A row whose image has the sha256 of an earlier row's (a lower key, of either split, in this block or a finished one
    before it) gets the status "duplicate", names the first row, and loses its tar member. Rows that are marked stay
    marked, even when the first loses its image. Shards without a new duplicate keep their files untouched, so a second
    call changes nothing. Before a shard is changed the block's ledger is taken away; a shard is rewritten as in a
    top-up, so a call that was killed loses nothing.

    Raises:
        MissingShardError: a shard of the block is not done.
        TarError: a tar does not hold the images that its rows name.
    """
    here = places_of(dataset, layout, block, FOLDER)
    receipts = {place: need(store, place, f"{dataset}/images") for place in here}
    digests, firsts = _own_firsts(store, here)
    for earlier in _before(layout, block):
        if has_ledger(store, dataset, earlier):
            if not has_index(store, dataset, earlier):
                write_index(store, dataset, layout, earlier)
            for split in SPLITS:
                for bucket in buckets(store, dataset, split, earlier):
                    at, there = find(digests, bucket)
                    np.minimum.at(firsts, at[there], bucket["row"][there])
    for place in here:
        rows = read_rows(store, place)
        marked = _marked(rows.to_pylist(), digests, firsts)
        if marked is not None:
            for split in SPLITS:
                store.delete(ledger_path(dataset, split, FOLDER, block))
            _rewrite(store, place, receipts[place], rows.schema, marked)
    write_index(store, dataset, layout, block)


def copies_elsewhere(store: Store, dataset: str, layout: Layout, block: str) -> dict[str, int]:
    """Blocks that hold images whose bytes an earlier block's image has, as far as this block is concerned.

    Later blocks that hold copies of this one's images, and this block itself when an earlier one has finished since it
    looked. Call it after `finish_block`; of two blocks that finish at the same time one at least sees the other.

    Returns:
        Number of images that should be marked as duplicates, by block.
    """
    own = places_of(dataset, layout, block, FOLDER)
    digests = np.unique(images_of(store, own)["sha256"])
    counts: Counter[str] = Counter()
    keys = layout.block_keys()
    for other in keys:
        if other == block or not has_index(store, dataset, other):
            continue
        later = keys.index(other) > keys.index(block)
        if not later and not has_ledger(store, dataset, other):
            continue  # it is being made, and names this block when it is done
        for split in SPLITS:
            for bucket in buckets(store, dataset, split, other):
                counts[other if later else block] += int(np.count_nonzero(find(digests, bucket)[1]))
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def _own_firsts(store: Store, places: list[ShardPlace]) -> tuple[NDArray[np.bytes_], NDArray[np.uint64]]:
    """Sorted distinct digests of a block's images and marked duplicates, and the first row that has each image now."""
    found: list[Records] = []
    for place in places:
        images, marked = read_images(store, place)
        marked["row"] = _NONE
        found += [images, marked]
    both = sort_records(np.concatenate(found))
    digests, starts = np.unique(both["sha256"], return_index=True)
    return digests, both["row"][starts].astype(np.uint64)


def _before(layout: Layout, block: str) -> list[str]:
    keys = layout.block_keys()
    return keys[: keys.index(block)]


def _marked(
    rows: list[dict[str, Any]], digests: NDArray[np.bytes_], firsts: NDArray[np.uint64]
) -> list[dict[str, Any]] | None:
    """Rows with their duplicates marked, None when nothing changes."""
    changed = False
    for row in rows:
        if row["status"] not in ("ok", "duplicate"):
            continue
        first = int(firsts[np.searchsorted(digests, np.bytes_(bytes.fromhex(row["sha256"])))])
        # A marked row has no image left: it stays marked even when its first is gone, and follows one that is earlier.
        if first < int(row["key"]) and sample_key(first) != row["duplicate_of"]:
            name = sample_key(first)
            row |= {"status": "duplicate", "reason": f"same bytes as {name}", "duplicate_of": name, "digest": None}
            changed = True
    return rows if changed else None


def _rewrite(store: Store, place: ShardPlace, before: Receipt, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    extra = pa.schema([field for field in schema if field.name not in ROW_SCHEMA.names])
    with closing(Members(store, place)) as members:
        items = (item_of(row, _image(place, members, row)) for row in rows)
        receipt = write_shard(store, place, before.recipe, items, before.run_id, extra, STATUSES)
    seconds = round(before.seconds + receipt.seconds, 3)  # the download's time would be lost otherwise
    write_receipt(store, place, receipt.model_copy(update={"seconds": seconds}))


def _image(place: ShardPlace, members: Members, row: dict[str, Any]) -> bytes | None:
    if row["status"] != "ok":
        return None
    data = members.take(row["key"], row["digest"])
    if data is None:
        raise TarError(
            f"{place.tar} does not hold the image of {row['key']} that its rows name; delete {place.receipt} and "
            f"materialize {place.dataset}/images for its block: only that image is downloaded again"
        )
    return data
