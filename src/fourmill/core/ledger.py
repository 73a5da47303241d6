"""The ledger of a block and stage: what became of every sample and every shard, and the digest Dagster keeps of it.

`{dataset}/{split}/_ledger/{folder}/block_03.parquet` has a row a sample, `block_03.shards.parquet` a row a shard.
`network` in the latter is what the weights are of, where that is known: which detector made a label, say.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from fourmill.core.digest import digest_json
from fourmill.core.names import SPLITS, Split
from fourmill.core.shards import Receipt, ShardPlace, need, parquet_bytes, parquet_table, read_rows
from fourmill.core.store import Store

_SHARD_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("inputs", pa.map_(pa.string(), pa.string())),
        ("weights", pa.string()),
        ("network", pa.string()),
        ("config", pa.string()),
        ("code_version", pa.string()),
        ("tar_sha256", pa.string()),
        ("tar_bytes", pa.int64()),
        ("counts", pa.map_(pa.string(), pa.int64())),
        ("seconds", pa.float64()),
        ("run_id", pa.string()),
    ]
)


@dataclass(frozen=True)
class BlockReport:
    """What one stage made of one block."""

    digest: str  # content of both splits' ledgers: Dagster's data version
    counts: dict[str, int]  # samples by status
    shards_done: int  # made by this call
    shards_skipped: int  # already there with the same recipe
    tar_bytes: int
    seconds: float  # spent on the shards' own work, summed
    ledgers: tuple[str, ...] = field(default=())

    @property
    def num_ok(self) -> int:
        return self.counts.get("ok", 0)

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())


def ledger_path(dataset: str, split: Split, folder: str, block: str) -> str:
    """The sample ledger of a block and stage."""
    return f"{dataset}/{split}/_ledger/{folder}/{block}.parquet"


def write_ledger(
    store: Store,
    dataset: str,
    folder: str,
    block: str,
    shards: range,
    asset: str,
    shards_done: int,
    network_of: Callable[[str], str | None] = lambda digest: None,
) -> BlockReport:
    """Gather the shards of a block into its ledgers, one a split.

    Args:
        asset: what makes the shards, for errors.
        shards_done: how many of them were made just now.
        network_of: the architecture (`rt_detr_v2`) behind a digest of weights; None: it is not known.

    Raises:
        MissingShardError: a shard of the block is not done.
    """
    counts: Counter[str] = Counter()
    contents: list[list[str]] = []
    paths: list[str] = []
    tar_bytes, seconds = 0, 0.0
    for split in SPLITS:
        places = [ShardPlace(dataset, split, folder, shard) for shard in shards]
        receipts = [need(store, place, asset) for place in places]
        samples = pa.concat_tables([read_rows(store, place) for place in places])
        path = ledger_path(dataset, split, folder, block)
        store.write(path, parquet_bytes(samples))
        networks = {digest: network_of(digest) for digest in {receipt.recipe.weights for receipt in receipts} if digest}
        table = _shard_table(shards, receipts, networks)
        store.write(path.replace(".parquet", ".shards.parquet"), parquet_bytes(table))
        paths.append(path)
        contents.append([receipt.content for receipt in receipts])
        for receipt in receipts:
            counts.update(receipt.counts)
            tar_bytes += receipt.tar_bytes
            seconds += receipt.seconds
    return BlockReport(
        digest=digest_json(contents),
        counts=dict(sorted(counts.items())),
        shards_done=shards_done,
        shards_skipped=len(SPLITS) * len(shards) - shards_done,
        tar_bytes=tar_bytes,
        seconds=seconds,
        ledgers=tuple(paths),
    )


def read_ledger(store: Store, dataset: str, split: Split, folder: str, block: str) -> pa.Table:
    """The sample rows of a block and stage. Raises FileNotFoundError."""
    return parquet_table(store.read(ledger_path(dataset, split, folder, block)))


def _shard_table(shards: range, receipts: list[Receipt], networks: dict[str, str | None]) -> pa.Table:
    rows = [
        {
            "shard": shard,
            "inputs": sorted(receipt.recipe.inputs.items()),
            "weights": receipt.recipe.weights,
            "network": networks.get(receipt.recipe.weights),
            "config": receipt.recipe.config,
            "code_version": receipt.recipe.code_version,
            "tar_sha256": receipt.tar_sha256,
            "tar_bytes": receipt.tar_bytes,
            "counts": sorted(receipt.counts.items()),
            "seconds": receipt.seconds,
            "run_id": receipt.run_id,
        }
        for shard, receipt in zip(shards, receipts, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=_SHARD_SCHEMA)
