"""What a person wants to see of a block of downloads: counts, failures, hosts, pictures."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fourmill.core.labels import decode_image
from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import ShardPlace, need, read_receipt, read_rows
from fourmill.core.sheet import fit_picture, grid_png
from fourmill.core.store import Store
from fourmill.core.tar import read_tar
from fourmill.ingest.duplicates import FOLDER
from fourmill.ingest.source import domains, read_source

_COLUMNS = 8
_MAX_BYTES = 60_000


def status_counts(store: Store, dataset: str, layout: Layout, block: str) -> dict[str, int]:
    """Rows of a block by status, both splits.

    Raises:
        MissingShardError: a shard of the block is not done.
    """
    counts: Counter[str] = Counter()
    for place in _places(dataset, layout, block):
        counts.update(need(store, place, f"{dataset}/images").counts)
    return dict(sorted(counts.items()))


def rows_in_block(store: Store, dataset: str, layout: Layout, block: str) -> int:
    """Rows of the list that lie in a block, good and bad. Raises ValueError without a numbered list."""
    shards = layout.shards_of(block)
    first, end = layout.rows_of(shards.start).start, layout.rows_of(shards[-1]).stop
    return max(0, min(end, read_source(store, dataset).num_rows) - first)


def failure_table(store: Store, dataset: str, layout: Layout, block: str) -> list[list]:
    """What went wrong: [status, rows, reason of the first such row], most frequent first.

    Raises:
        MissingShardError: a shard of the block is not done.
    """
    counts: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for rows in _all_rows(store, dataset, layout, block):
        for status, reason in zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True):
            if status != "ok":
                counts[status] += 1
                reasons.setdefault(status, reason or "")
    return [[status, rows, reasons[status]] for status, rows in sorted(counts.items(), key=lambda c: (-c[1], c[0]))]


def domain_table(store: Store, dataset: str, top: int = 10) -> list[list]:
    """The hosts that the list names most: [host, rows]; at most a hundred. Raises ValueError without a list."""
    return [[host, rows] for host, rows in domains(store, dataset)[:top]]


def images_preview(store: Store, dataset: str, layout: Layout, block: str, num: int = 24) -> bytes:
    """A contact sheet of up to `num` images from all over a block, a PNG under 60 kB."""
    pictures = _pictures(store, dataset, layout, block, num)
    for cell_px, colours in ((128, None), (96, None), (96, 64), (72, 64), (56, 32), (40, 16)):
        cells = [fit_picture(picture, cell_px) for picture in pictures]
        rows = [cells[i : i + _COLUMNS] for i in range(0, len(cells), _COLUMNS)]
        png = grid_png(rows or [[None]], [""] * _COLUMNS, cell_px=cell_px, colours=colours)
        if len(png) < _MAX_BYTES:
            break
    return png


def _pictures(store: Store, dataset: str, layout: Layout, block: str, num: int) -> list[NDArray[np.uint8]]:
    """The first few images of shards spread evenly over the block; tars are read only as far as needed."""
    receipts = ((place, read_receipt(store, place)) for place in _places(dataset, layout, block))
    filled = [(place, receipt.num_ok) for place, receipt in receipts if receipt and receipt.num_ok]
    chosen = filled[:: max(1, len(filled) // num)] if filled else []
    shares = [0] * len(chosen)
    while sum(shares) < num and any(share < ok for share, (_, ok) in zip(shares, chosen, strict=True)):
        for index, (_, ok) in enumerate(chosen):
            if shares[index] < ok and sum(shares) < num:
                shares[index] += 1
    pictures: list[NDArray[np.uint8]] = []
    for (place, _), share in zip(chosen, shares, strict=True):
        with store.open(place.tar) as stream:
            for (_, _, data), _ in zip(read_tar(stream, place.tar), range(share), strict=False):
                pictures.append(decode_image(data).rgb_HWC)
    return pictures


def _places(dataset: str, layout: Layout, block: str) -> list[ShardPlace]:
    return [ShardPlace(dataset, split, FOLDER, shard) for shard in layout.shards_of(block) for split in SPLITS]


def _all_rows(store: Store, dataset: str, layout: Layout, block: str) -> Iterator[pa.Table]:
    for place in _places(dataset, layout, block):
        need(store, place, f"{dataset}/images")
        yield read_rows(store, place)
