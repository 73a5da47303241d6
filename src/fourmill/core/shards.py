"""One shard of one stage: a tar, the rows that say what became of each sample, and a receipt, published in that order.

The receipt makes the shard done. It carries the recipe (digests of inputs, weights, config, and the code version), so
a second run skips the shards whose recipe is unchanged and redoes the others, and a killed run leaves nothing half-made.
A shard that is written again stays as it was until the new one is complete; then its receipt goes, rows and tar are
replaced, in that order, and the new receipt comes. Rows remember their recipe, and each of them the digest of its
member, so what a kill between these steps leaves behind can still be told apart and used (`ingest/kept.py` does).
"""

import io
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from fourmill.core.digest import digest_bytes, digest_json
from fourmill.core.names import SPLITS, Layout, SampleKey, Split, shard_name
from fourmill.core.store import Store
from fourmill.core.tar import TarError, TarWriter, read_tar

ROW_SCHEMA = pa.schema(
    [("key", pa.string()), ("status", pa.string()), ("reason", pa.string()), ("digest", pa.string())]
)
_RECIPE = "fourmill.recipe"  # key of the Parquet file's metadata


class MissingShardError(ValueError):
    """An input shard that is not there or not done; says which asset to materialize."""


@dataclass(frozen=True)
class ShardPlace:
    """Where one stage's shard lives: `{dataset}/{split}/{folder}/shard-00012.tar` and its companions."""

    dataset: str
    split: Split
    folder: str
    shard: int

    @property
    def tar(self) -> str:
        return f"{self.dataset}/{self.split}/{self.folder}/{shard_name(self.shard)}.tar"

    @property
    def receipt(self) -> str:
        return f"{self.tar.removesuffix('.tar')}.json"

    @property
    def rows(self) -> str:
        return f"{self.dataset}/{self.split}/_ledger/{self.folder}/{shard_name(self.shard)}.parquet"


def places_of(dataset: str, layout: Layout, block: str, folder: str) -> list[ShardPlace]:
    """The shards of a block's folder, each in both splits."""
    return [ShardPlace(dataset, split, folder, shard) for shard in layout.shards_of(block) for split in SPLITS]


class Recipe(BaseModel):
    """All that a shard's bytes depend on. Two equal recipes give equal tars."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    code_version: str
    config: str = ""  # digest of the component's config
    weights: str = ""  # digest of the network or tokenizer, where there is one
    inputs: dict[str, str] = {}  # digest of each input shard, by folder

    @property
    def digest(self) -> str:
        return digest_json(self.model_dump(mode="json"))


class Receipt(BaseModel):
    """What a finished shard says of itself; written last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    tar_sha256: str | None  # None when no sample was ok: then there is no tar
    rows_sha256: str
    tar_bytes: int
    counts: dict[str, int]  # samples by status; they add up to the rows of the shard and split
    seconds: float
    run_id: str  # the run that made it

    @property
    def num_ok(self) -> int:
        return self.counts.get("ok", 0)

    @property
    def content(self) -> str:
        """Digest of what the shard holds: the same for the same content, whoever made it and when."""
        return digest_json([self.tar_sha256, self.rows_sha256])


@dataclass(frozen=True)
class Item:
    """One sample on its way into a shard.

    `data` is the member's bytes when `status` is "ok" (None where the stage writes no member), and is ignored otherwise.
    `digest` is its sha256 where the stage knows it already, so that it is not computed again.
    """

    key: SampleKey
    status: str = "ok"
    reason: str | None = None
    ext: str = ""
    data: bytes | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None


def write_shard(
    store: Store,
    place: ShardPlace,
    recipe: Recipe,
    items: Iterable[Item],
    run_id: str,
    extra: pa.Schema | None = None,
    statuses: Collection[str] | None = None,
) -> Receipt:
    """Write one shard: rows, tar, receipt. What was there before stays until the last item has been taken.

    Args:
        items: samples in key order, one per row of the shard that belongs to the split. When they raise, the shard is
            left as it was.
        extra: schema of the columns that the stage adds to each row.
        statuses: those that the stage may give, where they are a closed set.

    Raises:
        ValueError: keys out of order or repeated, or a status that the stage does not have.
    """
    start = time.monotonic()
    schema = pa.schema([*ROW_SCHEMA, *(extra or ())])
    rows: list[dict[str, Any]] = []
    with store.create(place.tar) as stream:
        writer = TarWriter(stream)
        for item in items:
            _check_item(place, item, rows[-1]["key"] if rows else "", statuses)
            member = item.data if item.status == "ok" else None
            digest = None
            if member is not None:
                writer.add(item.key, item.ext, member)
                digest = item.digest or digest_bytes(member)
            rows.append({"key": item.key, "status": item.status, "reason": item.reason, "digest": digest, **item.extra})
        tar_sha256 = writer.close()
        table = pa.Table.from_pylist(rows, schema=schema)
        store.delete(place.receipt)  # from here to the end the shard is not done, whatever was there
        store.write(place.rows, parquet_bytes(table, {_RECIPE: recipe.model_dump_json()}))
    if not writer.num_members:
        store.delete(place.tar)
    receipt = Receipt(
        recipe=recipe,
        tar_sha256=tar_sha256 if writer.num_members else None,
        rows_sha256=digest_rows(table),
        tar_bytes=writer.num_bytes if writer.num_members else 0,
        counts=dict(sorted(Counter(row["status"] for row in rows).items())),
        seconds=round(time.monotonic() - start, 3),
        run_id=run_id,
    )
    write_receipt(store, place, receipt)
    return receipt


def _check_item(place: ShardPlace, item: Item, last: str, statuses: Collection[str] | None) -> None:
    if item.key <= last:
        raise ValueError(f"{place.tar}: sample {item.key} after {last}; keys must ascend")
    if statuses is not None and item.status not in statuses:
        raise ValueError(
            f"{place.tar}: sample {item.key} has status {item.status!r}; {place.folder} knows only {', '.join(sorted(statuses))}"
        )


def write_receipt(store: Store, place: ShardPlace, receipt: Receipt) -> None:
    """Declare a shard done; its tar and rows must be published already."""
    store.write(place.receipt, receipt.model_dump_json(indent=1).encode())


def read_receipt(store: Store, place: ShardPlace) -> Receipt | None:
    """The receipt of a shard, or None when it is not done (or its receipt is from a format this version does not know)."""
    try:
        return Receipt.model_validate_json(store.read(place.receipt))
    except (FileNotFoundError, ValueError):
        return None


def finished(store: Store, place: ShardPlace, recipe: Recipe) -> Receipt | None:
    """The receipt when the shard is done by exactly this recipe and its files are there; None when there is work to do."""
    receipt = read_receipt(store, place)
    if receipt is None or receipt.recipe != recipe or not store.exists(place.rows):
        return None
    if receipt.tar_sha256 is not None and not store.exists(place.tar):
        return None
    return receipt


def need(store: Store, place: ShardPlace, asset: str) -> Receipt:
    """The receipt of an input shard.

    Raises:
        MissingShardError: it is not done; the message names the asset that makes it.
    """
    receipt = read_receipt(store, place)
    if receipt is None:
        raise MissingShardError(
            f"{place.split} {place.folder} {shard_name(place.shard)} of {place.dataset} is not there: "
            f"materialize {asset} for its block first"
        )
    return receipt


def read_rows(store: Store, place: ShardPlace) -> pa.Table:
    """The rows of one shard: key, status, reason, digest, and what the stage added."""
    return parquet_table(store.read(place.rows)).replace_schema_metadata(None)


def read_remembered(store: Store, place: ShardPlace) -> tuple[Recipe, pa.Table] | None:
    """The rows of a shard and the recipe they were made by, whether or not the shard is done; None when there are none."""
    try:
        data = store.read(place.rows)
    except FileNotFoundError:
        return None
    table = parquet_table(data)
    recipe = (table.schema.metadata or {}).get(_RECIPE.encode())
    return (Recipe.model_validate_json(recipe), table.replace_schema_metadata(None)) if recipe else None


def read_members(store: Store, place: ShardPlace) -> Iterator[tuple[SampleKey, bytes]]:
    """Key and bytes of every sample of a finished shard, in order; nothing for a shard without samples.

    Raises:
        TarError: the tar's bytes are not those its receipt names.
    """
    receipt = read_receipt(store, place)
    if receipt is None or receipt.tar_sha256 is None:
        return
    data = store.read(place.tar)
    if digest_bytes(data) != receipt.tar_sha256:
        raise TarError(f"{place.tar} does not have the digest its receipt names")
    for key, _, member in read_tar(io.BytesIO(data), place.tar):
        yield key, member


def needed_members(store: Store, place: ShardPlace, asset: str) -> Iterator[tuple[SampleKey, bytes]]:
    """`read_members` of a shard that others stand on.

    Raises:
        MissingShardError: its tar is gone while its receipt is there.
        TarError: it is damaged. Both name the asset to materialize, the second also the receipt to delete: only bytes that are
            read tell that they are damaged.
    """
    try:
        yield from read_members(store, place)
    except FileNotFoundError as error:
        raise gone(place, asset) from error
    except TarError as error:
        raise TarError(f"{error}: delete {place.receipt} and materialize {asset} for its block again") from error


def gone(place: ShardPlace, asset: str) -> MissingShardError:
    """The error about a tar that others stand on and that is gone while its receipt is there."""
    return MissingShardError(_gone(place, f"{asset} for its block"))


def damage_of(place: ShardPlace, error: Exception) -> str:
    """What is wrong with a shard that `read_members` could not read, and what to do about it, for its own asset's check."""
    if isinstance(error, FileNotFoundError):
        return _gone(place, "the block")
    return f"{error}; delete its receipt and rebuild the block"


def _gone(place: ShardPlace, what: str) -> str:
    return f"{place.tar} is gone, though its receipt is there: materialize {what} again"


def parquet_bytes(table: pa.Table, metadata: dict[str, str] | None = None) -> bytes:
    """A table as Parquet, with nothing in it that changes from run to run; `metadata` goes to the file's own."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=False) as writer:
        writer.write_table(table)
        if metadata:
            writer.add_key_value_metadata(metadata)
    return sink.getvalue()


def parquet_table(data: bytes) -> pa.Table:
    """What `parquet_bytes` has written. `pyarrow.parquet.read_table` would import all of Arrow's data sets for it."""
    return pq.ParquetFile(pa.BufferReader(data)).read()


def digest_rows(table: pa.Table) -> str:
    """Digest of a rows table without the columns that change from run to run (`seconds`, `attempts`)."""
    stable = table.drop_columns([c for c in ("seconds", "attempts") if c in table.column_names])
    return digest_json(stable.to_pylist())
