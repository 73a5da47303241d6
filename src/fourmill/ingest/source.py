"""The source index: the rows of a source, numbered, in Parquet, one part a shard, under a digest of all that decides them.

`source/{digest}/part-00012.parquet` holds the rows of shard 12, `source/{digest}/index.json` the totals, and
`source/{dataset}.json`, written last, names the digest that the dataset uses. The digest is of the rows, not of the file
they came in: the same rows as TSV, CSV or Parquet, compressed or not, have the same one. (A bad row's reason is part of
it, and reasons speak of the format.)
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow makes the functions of pyarrow.compute when it is imported)

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from fourmill.core.digest import digest_json
from fourmill.core.names import Layout
from fourmill.core.shards import parquet_bytes, parquet_table
from fourmill.core.store import Store, open_store
from fourmill.core.work import Progress, no_progress
from fourmill.ingest.config import VERSION, SourceConfig
from fourmill.ingest.list_file import list_stamp
from fourmill.ingest.listing import ROWS, RowsDigest
from fourmill.ingest.numbering import SOURCE_SCHEMA, Numberer, repeated_hashes, url_hashes
from fourmill.ingest.rows import Rows, open_rows

__all__ = [
    "SOURCE_SCHEMA",
    "SourceIndex",
    "build_source_index",
    "count_rows",
    "domains",
    "is_current",
    "read_source",
    "read_source_rows",
    "shard_source_digest",
]

_MAX_DOMAINS = 500_000  # hosts counted at once; beyond, those seen once are forgotten
_KEPT_DOMAINS = 100
_LOG = logging.getLogger(__name__)


class SourceIndex(BaseModel):
    """A source that has been numbered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str  # of the rows, the split and the layout: Dagster's data version
    num_rows: int  # good and bad
    num_bad_rows: int
    num_repeated_urls: int  # rows whose URL an earlier row has


class _IndexFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    index: SourceIndex
    rows_digest: str
    rows_per_shard: int
    val_fraction: float
    parts: list[str]  # digest of each part's rows
    domains: list[tuple[str, int]]  # most frequent first


class _Stamp(BaseModel):
    """What told, when a dataset's source was numbered, that it is this one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    stamp: str


def build_source_index(
    store: Store, dataset: str, config: SourceConfig, layout: Layout, progress: Progress = no_progress
) -> SourceIndex:
    """Number the rows of a source and publish them.

    The source is read twice: once for its digest and the hashes of its URLs, once to write the parts. One that is
    numbered already is read once.

    Memory: one batch of rows (4,096, or half a megabyte of text) and one shard's; of every good row 8 bytes of hash,
    16 while they are gathered and sorted; of every URL that occurs more than once 24 bytes. CC12M has 12.4 million
    rows: 200 MB, or 350 MB at the worst, where every URL occurs twice; with pyarrow and Python around it under 0.6 GB.
    It was 0.34 GB over 12.4 million made-up rows without repeats.

    Args:
        progress: called with (rows read, rows that the layout holds) in the first pass, (rows written, rows) in the second.

    Raises:
        ValueError: the source is missing, empty, longer than the layout, cannot be read, or changed while it was read.
    """
    stamp = list_stamp(config) if config.kind == "list" else ""
    with open_rows(config) as rows:
        survey = _survey(rows, layout.num_rows, progress)
        _check_length(config, layout, survey.num_rows)
        digest = digest_json([survey.digest, config.val_fraction, layout.rows_per_shard, VERSION])
        try:
            made = _read_index(store, digest).index
        except (FileNotFoundError, ValueError):
            made = _write_parts(store, digest, rows, survey, config, layout, progress)
    store.write(_stamp_path(dataset), _Stamp(digest=digest, stamp=stamp or "").model_dump_json(indent=1).encode())
    store.write(f"source/{dataset}.json", made.model_dump_json(indent=1).encode())
    return made


def count_rows(config: SourceConfig) -> int:
    """Rows of a source, good and bad: what the blocks have to hold.

    Raises:
        ValueError: it is missing, empty or cannot be read.
    """
    with open_rows(config) as rows:
        num_rows = sum(batch.num_rows for batch in rows())
    if not num_rows:
        raise ValueError(_no_rows(config))
    return num_rows


def numbered_rows(store: Store, dataset: str, config: SourceConfig) -> int | None:
    """Rows of a list that the dataset has numbered and that has not changed since, without reading it; None for others."""
    try:
        index = read_source(store, dataset)
        stamp = list_stamp(config) if config.kind == "list" else ""
    except ValueError:
        return None
    return index.num_rows if stamp and _read_stamp(store, dataset) == _Stamp(digest=index.digest, stamp=stamp) else None


def read_source(store: Store, dataset: str) -> SourceIndex:
    """The index that a dataset uses.

    Raises:
        ValueError: there is none; the message names the asset that makes it.
    """
    try:
        return SourceIndex.model_validate_json(store.read(f"source/{dataset}.json"))
    except FileNotFoundError:
        raise ValueError(f"{dataset} has no numbered list: materialize {dataset}/source_index first") from None


def is_current(store: Store, dataset: str, config: SourceConfig) -> bool:
    """Whether the numbered rows are the source's as it is now: who edits a list expects the next run to see it.

    A list is not read again when its size and time, or its server's ETag, are those it was numbered with, or when its
    server does not answer. Pictures at hand are listed again.

    Raises:
        ValueError: the source cannot be read.
    """
    try:
        numbered = _read_index(store, read_source(store, dataset).digest)
    except (ValueError, FileNotFoundError):
        return False
    if config.kind == "list":
        stamp = list_stamp(config)
        if stamp is None:
            _LOG.warning("%s cannot be asked whether it changed; going on with the rows of %s", config.where, dataset)
            return True
        if stamp and _read_stamp(store, dataset) == _Stamp(digest=numbered.index.digest, stamp=stamp):
            return True
    with open_rows(config) as rows:
        digest = RowsDigest(ROWS.names)
        for batch in rows():
            digest.update(batch)
    return digest.hexdigest() == numbered.rows_digest


def read_source_rows(store: Store, dataset: str, shard: int) -> pa.Table:
    """Rows of one shard, both splits, in order; no rows past the end of the list.

    Columns: row int64, url, caption, split, status ("ok" or "bad_row"), reason, url_duplicate_of (a sample key), origin
    (where a picture at hand was downloaded from).

    Raises:
        ValueError: the dataset has no numbered list.
    """
    digest = read_source(store, dataset).digest
    if shard >= len(_parts(store.root, digest)):
        return SOURCE_SCHEMA.empty_table()
    return parquet_table(store.read(_part_path(digest, shard)))


def shard_source_digest(store: Store, dataset: str, shard: int) -> str:
    """Digest of the rows of one shard: it changes when one of them does, not when the list grows elsewhere.

    Raises:
        ValueError: the dataset has no numbered list.
    """
    parts = _parts(store.root, read_source(store, dataset).digest)
    return parts[shard] if shard < len(parts) else digest_json([])


def domains(store: Store, dataset: str) -> list[tuple[str, int]]:
    """Hosts and their rows, most frequent first; the first hundred. Raises ValueError without a numbered list."""
    return _read_index(store, read_source(store, dataset).digest).domains


@dataclass(frozen=True)
class _Survey:
    """What the first reading of a source finds."""

    digest: str  # of the rows
    num_rows: int
    repeated: np.ndarray  # hashes that more than one URL has, ascending


def _survey(rows: Rows, capacity: int, progress: Progress) -> _Survey:
    digest, num_rows = RowsDigest(ROWS.names), 0
    hashes: list[np.ndarray] = []
    for batch in rows():
        digest.update(batch)
        good = batch.filter(pc.is_null(batch["reason"]))
        hashes.append(url_hashes(good["url"])[:, 0].copy())
        num_rows += batch.num_rows
        progress(num_rows, max(capacity, num_rows + 1), "rows read")
    return _Survey(digest.hexdigest(), num_rows, repeated_hashes(hashes))


def _check_length(config: SourceConfig, layout: Layout, num_rows: int) -> None:
    if not num_rows:
        raise ValueError(_no_rows(config))
    if num_rows > layout.num_rows:
        raise ValueError(
            f"the {config.kind} {config.where!r} has {num_rows} rows, the layout holds {layout.num_rows} "
            f"({layout.num_blocks} blocks of {layout.shards_per_block} shards of {layout.rows_per_shard} rows); "
            "`fourmill run` gives the project's list the blocks it needs; another data set's num_blocks is raised by hand, or its "
            "list cut"
        )


def _no_rows(config: SourceConfig) -> str:
    wanted = {
        "list": "row of URL and caption",
        "folder": "picture in a class folder",
        "webdataset": ".tar with samples",
    }
    return f"the {config.kind} {config.where!r} is empty; it takes at least one {wanted[config.kind]}"


def _write_parts(
    store: Store,
    digest: str,
    rows: Rows,
    survey: _Survey,
    config: SourceConfig,
    layout: Layout,
    progress: Progress,
) -> SourceIndex:
    numberer, num_rows = Numberer(config.val_fraction, survey.repeated), survey.num_rows
    parts: list[str] = []
    hosts: Counter[str] = Counter()
    bad = repeats = 0
    read_again = RowsDigest(ROWS.names)
    for table in _cut(_numbered(rows(), numberer, read_again, hosts), layout.rows_per_shard):
        store.write(_part_path(digest, len(parts)), parquet_bytes(table))
        part = RowsDigest(SOURCE_SCHEMA.names[1:])  # the row numbers follow from the part's
        part.update(table)
        parts.append(part.hexdigest())
        bad += table.num_rows - table["reason"].null_count
        repeats += table.num_rows - table["url_duplicate_of"].null_count
        progress(min(len(parts) * layout.rows_per_shard, num_rows), num_rows, "rows written")
    if read_again.hexdigest() != survey.digest:
        raise ValueError(
            f"the {config.kind} {config.where!r} changed while it was read; start again when nobody writes it"
        )
    index = SourceIndex(digest=digest, num_rows=num_rows, num_bad_rows=bad, num_repeated_urls=repeats)
    whole = _IndexFile(
        index=index,
        rows_digest=survey.digest,
        rows_per_shard=layout.rows_per_shard,
        val_fraction=config.val_fraction,
        parts=parts,
        domains=sorted(hosts.items(), key=lambda one: (-one[1], one[0]))[:_KEPT_DOMAINS],
    )
    store.write(_index_path(digest), whole.model_dump_json(indent=1).encode())
    return index


def _numbered(
    batches: Iterator[pa.RecordBatch], numberer: Numberer, digest: RowsDigest, hosts: Counter[str]
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        digest.update(batch)
        for one in pc.value_counts(batch["host"].drop_null()).to_pylist():
            hosts[one["values"]] += one["counts"]
        if len(hosts) > _MAX_DOMAINS:
            once = [host for host, seen in hosts.items() if seen == 1]
            for host in once:
                del hosts[host]
        yield numberer.number(batch)


def _cut(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """Tables of `size` rows, the last one of what is left."""
    held: list[pa.RecordBatch] = []
    num_held = 0
    for batch in batches:
        held.append(batch)
        num_held += batch.num_rows
        if num_held >= size:
            table = pa.Table.from_batches(held, SOURCE_SCHEMA)
            whole = num_held - num_held % size
            for start in range(0, whole, size):
                yield table.slice(start, size).combine_chunks()
            held, num_held = table.slice(whole).to_batches(), num_held - whole
    if num_held:
        yield pa.Table.from_batches(held, SOURCE_SCHEMA).combine_chunks()


def _part_path(digest: str, shard: int) -> str:
    return f"source/{digest}/part-{shard:05d}.parquet"


def _index_path(digest: str) -> str:
    return f"source/{digest}/index.json"


def _stamp_path(dataset: str) -> str:
    return f"source/{dataset}.stamp.json"


def _read_index(store: Store, digest: str) -> _IndexFile:
    return _IndexFile.model_validate_json(store.read(_index_path(digest)))


def _read_stamp(store: Store, dataset: str) -> _Stamp | None:
    try:
        return _Stamp.model_validate_json(store.read(_stamp_path(dataset)))
    except (FileNotFoundError, ValueError):
        return None


@lru_cache(maxsize=4)
def _parts(root: str, digest: str) -> tuple[str, ...]:
    # The digest names the content, so what was read once stays true; a driver asks for every shard of a block.
    return tuple(_read_index(open_store(root), digest).parts)
