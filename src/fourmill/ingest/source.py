"""The source index: the list as numbered rows in Parquet, one part a shard, under a digest of all that decides them.

`source/{digest}/part-00012.parquet` holds the rows of shard 12, `source/{digest}/index.json` the totals, and
`source/{dataset}.json`, written last, names the digest that the dataset uses.
"""

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from fourmill.core.digest import digest_json
from fourmill.core.names import Layout, sample_key, split_of
from fourmill.core.shards import digest_rows, parquet_bytes
from fourmill.core.store import Store, open_store
from fourmill.ingest.config import VERSION, SourceConfig
from fourmill.ingest.listing import ListRow, count_rows, iterate_lines, open_list, parse_row

__all__ = [
    "SourceIndex",
    "build_source_index",
    "count_rows",
    "domains",
    "read_source",
    "read_source_rows",
    "shard_source_digest",
]

SOURCE_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("split", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("url_duplicate_of", pa.string()),
    ]
)
_MAX_DOMAINS = 500_000  # hosts counted at once; beyond, those seen once are forgotten
_KEPT_DOMAINS = 100


class SourceIndex(BaseModel):
    """A list that has been numbered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str  # of the list's rows, the split and the layout: Dagster's data version
    num_rows: int  # good and bad
    num_bad_rows: int
    num_repeated_urls: int  # rows whose URL an earlier row has


class _IndexFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    index: SourceIndex
    list_sha256: str
    rows_per_shard: int
    val_fraction: float
    parts: list[str]  # digest of each part's rows
    domains: list[tuple[str, int]]  # most frequent first


def build_source_index(store: Store, dataset: str, config: SourceConfig, layout: Layout) -> SourceIndex:
    """Number the rows of a list and publish them.

    The list is read twice: once for its digest and the hashes of its URLs (16 bytes a row are held: 200 MB for
    CC12M), once to write the parts (one shard's rows are held, and the URLs that occur more than once). A list that
    is numbered already is read once.

    Raises:
        ValueError: the list is missing, a folder, empty, longer than the layout, or changed while it was read.
    """
    sha256, num_rows, repeated = _survey(config.list)
    if num_rows > layout.num_rows:
        raise ValueError(
            f"the list {config.list!r} has {num_rows} rows, the layout holds {layout.num_rows} ({layout.num_blocks} "
            f"blocks of {layout.shards_per_block} shards of {layout.rows_per_shard} rows); raise num_blocks or "
            "shards_per_block, or cut the list"
        )
    digest = digest_json([sha256, config.val_fraction, layout.rows_per_shard, VERSION])
    try:
        made = _read_index(store, digest).index
    except (FileNotFoundError, ValueError):
        made = _write_parts(store, digest, sha256, config, layout, repeated)
    store.write(f"source/{dataset}.json", made.model_dump_json(indent=1).encode())
    return made


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
    """Whether the numbered list is the file as it is now: a person who edits the list expects the next run to see it."""
    try:
        numbered = _read_index(store, read_source(store, dataset).digest)
    except (ValueError, FileNotFoundError):
        return False
    return _survey(config.list)[0] == numbered.list_sha256


def read_source_rows(store: Store, dataset: str, shard: int) -> pa.Table:
    """Rows of one shard, both splits, in order; no rows past the end of the list.

    Columns: row int64, url, caption, split, status ("ok" or "bad_row"), reason, url_duplicate_of (a sample key).

    Raises:
        ValueError: the dataset has no numbered list.
    """
    digest = read_source(store, dataset).digest
    if shard >= len(_parts(store.root, digest)):
        return SOURCE_SCHEMA.empty_table()
    return pq.read_table(io.BytesIO(store.read(_part_path(digest, shard))))


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


def _survey(path: str) -> tuple[str, int, frozenset[int]]:
    """Digest of the list, its rows, and the hashes that more than one URL row has."""
    sha, hashes, num_rows = hashlib.sha256(), array("Q"), 0
    with open_list(path) as file:
        for line in iterate_lines(file):
            sha.update(line)
            num_rows += 1
            row = parse_row(line)
            if row.reason is None:
                hashes.append(_url_hash(row.url))
    ordered = np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.empty(0, np.uint64)
    return sha.hexdigest(), num_rows, frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def _write_parts(
    store: Store, digest: str, sha256: str, config: SourceConfig, layout: Layout, repeated: frozenset[int]
) -> SourceIndex:
    parts: list[str] = []
    counts: Counter[str] = Counter()
    hosts: Counter[str] = Counter()
    first_rows: dict[str, int] = {}  # of URLs that may be repeated
    sha = hashlib.sha256()
    with open_list(config.list) as file:
        rows = _numbered(iterate_lines(file), sha)
        while chunk := list(islice(rows, layout.rows_per_shard)):
            records = [_record(number, row, config.val_fraction, repeated, first_rows) for number, row in chunk]
            hosts.update(row.host for _, row in chunk if row.reason is None)
            if len(hosts) > _MAX_DOMAINS:
                hosts = Counter({host: seen for host, seen in hosts.items() if seen > 1})
            counts["rows"] += len(records)
            counts["bad"] += sum(record["status"] != "ok" for record in records)
            counts["repeated"] += sum(record["url_duplicate_of"] is not None for record in records)
            table = pa.Table.from_pylist(records, schema=SOURCE_SCHEMA)
            store.write(_part_path(digest, len(parts)), parquet_bytes(table))
            parts.append(digest_rows(table))
    if sha.hexdigest() != sha256:
        raise ValueError(f"the list {config.list!r} changed while it was read; start again when nobody writes it")
    index = SourceIndex(
        digest=digest,
        num_rows=counts["rows"],
        num_bad_rows=counts["bad"],
        num_repeated_urls=counts["repeated"],
    )
    whole = _IndexFile(
        index=index,
        list_sha256=sha256,
        rows_per_shard=layout.rows_per_shard,
        val_fraction=config.val_fraction,
        parts=parts,
        domains=sorted(hosts.items(), key=lambda one: (-one[1], one[0]))[:_KEPT_DOMAINS],
    )
    store.write(_index_path(digest), whole.model_dump_json(indent=1).encode())
    return index


def _numbered(lines: Iterator[bytes], sha: "hashlib._Hash") -> Iterator[tuple[int, ListRow]]:
    for number, line in enumerate(lines):
        sha.update(line)
        yield number, parse_row(line)


def _record(
    number: int, row: ListRow, val_fraction: float, repeated: frozenset[int], first_rows: dict[str, int]
) -> dict[str, Any]:
    first = number
    if row.reason is None and _url_hash(row.url) in repeated:
        first = first_rows.setdefault(row.url, number)
    return {
        "row": number,
        "url": row.url,
        "caption": row.caption,
        "split": split_of(row.url, val_fraction),
        "status": row.status,
        "reason": row.reason,
        "url_duplicate_of": sample_key(first) if first != number else None,
    }


def _url_hash(url: str) -> int:
    return int.from_bytes(hashlib.blake2b(url.encode(), digest_size=8).digest(), "little")


def _part_path(digest: str, shard: int) -> str:
    return f"source/{digest}/part-{shard:05d}.parquet"


def _index_path(digest: str) -> str:
    return f"source/{digest}/index.json"


def _read_index(store: Store, digest: str) -> _IndexFile:
    return _IndexFile.model_validate_json(store.read(_index_path(digest)))


@lru_cache(maxsize=4)
def _parts(root: str, digest: str) -> tuple[str, ...]:
    # The digest names the content, so what was read once stays true; a driver asks for every shard of a block.
    return tuple(_read_index(open_store(root), digest).parts)
