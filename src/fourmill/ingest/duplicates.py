"""Exact duplicates: of all rows whose stored images have the same bytes, the first keeps its image."""

from typing import Any

import pyarrow as pa

from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import (
    ROW_SCHEMA,
    Item,
    Receipt,
    ShardPlace,
    need,
    read_members,
    read_receipt,
    read_rows,
    write_receipt,
    write_shard,
)
from fourmill.core.store import Store

FOLDER = "images"
_EXT = "jpg"


def finish_block(store: Store, dataset: str, layout: Layout, block: str) -> None:
    """Mark a block's duplicates, once its shards are done and before its ledger is written.

    A row whose image has the sha256 of an earlier row's (a lower key, of either split, in this block or one before it
    that is done) gets the status "duplicate", names the first row, and loses its tar member. Rows that are marked stay
    marked. Shards without a new duplicate keep their files untouched, so a second call changes nothing. A shard is
    rewritten as it is written at first, receipt last: a call that was killed leaves it done, or to be downloaded again.
    Blocks after this one are not read: made out of order, a block may keep a copy of one made before it.

    Memory: about 150 bytes a row of this block (30 MB at 200,000 rows), the rows of one earlier shard at a time, and
    the images of one shard while it is rewritten. Earlier blocks are only looked up, so it does not grow with the data
    set; the rows read do.

    Raises:
        MissingShardError: a shard of the block is not done.
    """
    shards = layout.shards_of(block)
    here = [ShardPlace(dataset, split, FOLDER, shard) for shard in shards for split in SPLITS]
    receipts = {place: need(store, place, f"{dataset}/images") for place in here}
    firsts: dict[bytes, str] = {}  # "" until the first row that has an image is met
    for place in here:
        for key, status, sha256 in _stored(store, place):
            firsts[sha256] = _lower(firsts.get(sha256, ""), key if status == "ok" else "")
    earlier = [ShardPlace(dataset, split, FOLDER, shard) for shard in range(shards.start) for split in SPLITS]
    for place in earlier:
        for key, status, sha256 in _stored(store, place):
            if status == "ok" and sha256 in firsts:
                firsts[sha256] = _lower(firsts[sha256], key)
    for place in here:
        rows = read_rows(store, place)
        marked = _marked(rows.to_pylist(), firsts)
        if marked is not None:
            _rewrite(store, place, receipts[place], rows.schema, marked)


def _stored(store: Store, place: ShardPlace) -> list[tuple[str, str, bytes]]:
    """Key, status and sha256 of a shard's images and marked duplicates; none of a shard that is not done."""
    if read_receipt(store, place) is None or not store.exists(place.rows):
        return []
    rows = read_rows(store, place)
    columns = (rows[name].to_pylist() for name in ("key", "status", "sha256"))
    return [(key, status, bytes.fromhex(sha256)) for key, status, sha256 in zip(*columns, strict=True) if sha256]


def _lower(one: str, other: str) -> str:
    return min(one, other) if one and other else one or other


def _marked(rows: list[dict[str, Any]], firsts: dict[bytes, str]) -> list[dict[str, Any]] | None:
    """Rows with their duplicates marked, None when nothing changes."""
    changed = False
    for row in rows:
        first = firsts[bytes.fromhex(row["sha256"])] if row["sha256"] else ""
        # A marked row has no image left: it stays marked even when its first is gone, and follows one that is earlier.
        if first and first < row["key"] and first != row["duplicate_of"]:
            row |= {"status": "duplicate", "reason": f"same bytes as {first}", "duplicate_of": first}
            changed = True
    return rows if changed else None


def _rewrite(store: Store, place: ShardPlace, before: Receipt, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    members = dict(read_members(store, place))  # all of them now: the receipt goes away when writing begins
    own = set(ROW_SCHEMA.names)
    items = [
        Item(
            row["key"],
            row["status"],
            row["reason"],
            _EXT,
            members.get(row["key"]),
            {name: value for name, value in row.items() if name not in own},
        )
        for row in rows
    ]
    extra = pa.schema([field for field in schema if field.name not in own])
    receipt = write_shard(store, place, before.recipe, items, before.run_id, extra)
    seconds = round(before.seconds + receipt.seconds, 3)  # the download's time would be lost otherwise
    write_receipt(store, place, receipt.model_copy(update={"seconds": seconds}))
