"""What a person wants to see of a block of downloads: counts, failures, hosts, pictures."""

from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from fourmill.core.labels import decode_image
from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import places_of, read_receipt, read_rows
from fourmill.core.sheet import fit_picture, grid_png
from fourmill.core.spread import spread_over
from fourmill.core.store import Store
from fourmill.core.tar import read_tar
from fourmill.ingest.at_hand import is_at_hand
from fourmill.ingest.duplicates import FOLDER
from fourmill.ingest.source import domains, read_source
from fourmill.ingest.statuses import BROKEN_PICTURE

_COLUMNS = 8
_MAX_BYTES = 60_000


@dataclass(frozen=True)
class BlockSurvey:
    """What became of the rows of a block, both splits."""

    num_shards: int  # done, with their files in place; a shard counts once for each split
    wanted_shards: int
    wanted_rows: int  # rows of the list that lie in the block, good and bad
    counts: dict[str, int]  # rows by status
    reasons: dict[str, str]  # of the first row of each failure
    num_arrived: int  # rows whose bytes were received whole
    num_decoded: int  # of those: rows whose bytes were a picture
    hosts: dict[str, tuple[int, int]]  # rows and images (ok or duplicate) of each host

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    @property
    def num_asked(self) -> int:
        """Rows that were to be fetched: neither bad nor opted out."""
        return self.num_rows - self.counts.get("bad_row", 0) - self.counts.get("opted_out", 0)

    @property
    def num_images(self) -> int:
        """Rows that became an image, kept or marked as a duplicate."""
        return self.counts.get("ok", 0) + self.counts.get("duplicate", 0)


def survey_block(store: Store, dataset: str, layout: Layout, block: str) -> BlockSurvey:
    """Read the rows of a block once and count; a shard that is not done has none. Memory: the rows of one shard, and the
    block's host names.

    Raises:
        ValueError: the dataset has no numbered list.
    """
    counts: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    rows_of: Counter[str] = Counter()
    images_of: Counter[str] = Counter()
    shards, arrived, broken = 0, 0, 0
    for place in places_of(dataset, layout, block, FOLDER):
        receipt = read_receipt(store, place)
        if receipt is None or not store.exists(place.rows):
            continue
        shards += receipt.tar_sha256 is None or store.exists(place.tar)
        table = read_rows(store, place)
        columns = (table[name].to_pylist() for name in ("status", "reason", "url", "source_sha256"))
        for status, reason, url, source_sha256 in zip(*columns, strict=True):
            counts[status] += 1
            if status != "ok":
                reasons.setdefault(status, reason or "")
            if source_sha256 is not None and status != "opted_out":
                arrived += 1
                broken += status in BROKEN_PICTURE
            if status != "bad_row":
                host = _host(url)
                rows_of[host] += 1
                images_of[host] += status in ("ok", "duplicate")
    return BlockSurvey(
        num_shards=shards,
        wanted_shards=len(SPLITS) * len(layout.shards_of(block)),
        wanted_rows=_rows_in_block(store, dataset, layout, block),
        counts=dict(sorted(counts.items())),
        reasons=reasons,
        num_arrived=arrived,
        num_decoded=arrived - broken,
        hosts={host: (rows, images_of[host]) for host, rows in rows_of.items()},
    )


def failure_table(survey: BlockSurvey) -> list[list]:
    """What went wrong: [status, rows, % of all rows, reason of the first such row], most frequent first."""
    failures = [(status, rows) for status, rows in survey.counts.items() if status != "ok"]
    ordered = sorted(failures, key=lambda failure: (-failure[1], failure[0]))
    return [[status, rows, _percent(rows, survey.num_rows), survey.reasons[status]] for status, rows in ordered]


def host_table(survey: BlockSurvey, top: int = 20) -> list[list]:
    """The hosts with most rows of a block: [host, rows, % that became images]."""
    ordered = sorted(survey.hosts.items(), key=lambda host: (-host[1][0], host[0]))[:top]
    return [[host, rows, _percent(images, rows)] for host, (rows, images) in ordered]


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
    receipts = ((place, read_receipt(store, place)) for place in places_of(dataset, layout, block, FOLDER))
    filled = [(at, made.num_ok) for at, made in receipts if made and made.num_ok and store.exists(at.tar)]
    shares = spread_over([there for _, there in filled], num)
    pictures: list[NDArray[np.uint8]] = []
    for place, share in [(place, share) for (place, _), share in zip(filled, shares, strict=True) if share]:
        with store.open(place.tar) as stream:
            for (_, _, data), _ in zip(read_tar(stream, place.tar), range(share), strict=False):
                pictures.append(decode_image(data).rgb_HWC)
    return pictures


def _rows_in_block(store: Store, dataset: str, layout: Layout, block: str) -> int:
    shards = layout.shards_of(block)
    first, end = layout.rows_of(shards.start).start, layout.rows_of(shards[-1]).stop
    return max(0, min(end, read_source(store, dataset).num_rows) - first)


def _host(url: str) -> str:
    if is_at_hand(url):
        return "(at hand)"
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1) if whole else 0.0
