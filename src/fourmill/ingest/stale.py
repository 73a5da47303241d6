"""Blocks that a changed opt-out list reaches, found without reading what it does not.

Beside its ledger a block keeps the digest of the list that its shards are known to agree with
(`{dataset}/train/_ledger/images/block_03.opt_out`). As long as the list is that one, a look costs one small file a
block; after a change every finished block is compared once, row by row.
"""

from fourmill.core.ledger import ledger_path
from fourmill.core.names import SPLITS, Layout, Split
from fourmill.core.shards import ShardPlace, read_receipt, read_remembered
from fourmill.core.store import Store
from fourmill.ingest.digest_index import FOLDER, has_ledger
from fourmill.ingest.optout import INPUT, OptOut, entries_of, input_digest
from fourmill.ingest.source import read_source_rows


def remember_opt_out(store: Store, dataset: str, block: str, opt_out: OptOut) -> None:
    """Note that all shards of a block agree with a list. Call it when they have just been made by it."""
    store.write(_path(dataset, block), opt_out.digest.encode())


def blocks_to_rebuild(store: Store, dataset: str, layout: Layout, opt_out: OptOut) -> list[str]:
    """Finished blocks that hold a row which the list now names, or which it names no more.

    Rebuilt, they lose or regain just these rows. Blocks that are not finished are not named.

    Raises:
        ValueError: the dataset has no numbered list.
    """
    found: list[str] = []
    for block in layout.block_keys():
        if not has_ledger(store, dataset, block) or _remembered(store, dataset, block) == opt_out.digest:
            continue
        if any(
            _differs(store, dataset, split, shard, opt_out) for shard in layout.shards_of(block) for split in SPLITS
        ):
            found.append(block)
        else:
            remember_opt_out(store, dataset, block, opt_out)
    return found


def opt_out_input(store: Store, dataset: str, split: Split, shard: int, opt_out: OptOut) -> dict[str, str]:
    """The recipe's input for a shard: the digest of the entries that match its rows; nothing when none does."""
    if not opt_out:
        return {}
    remembered = read_remembered(store, ShardPlace(dataset, split, FOLDER, shard))
    ledger = {row["key"]: row for row in remembered[1].to_pylist()} if remembered else {}
    listed = read_source_rows(store, dataset, shard).to_pylist()
    entries = entries_of(opt_out, (row for row in listed if row["split"] == split), ledger)
    return {INPUT: input_digest(entries)} if entries else {}


def _differs(store: Store, dataset: str, split: Split, shard: int, opt_out: OptOut) -> bool:
    receipt = read_receipt(store, ShardPlace(dataset, split, FOLDER, shard))
    applied = receipt.recipe.inputs.get(INPUT) if receipt else None
    return opt_out_input(store, dataset, split, shard, opt_out).get(INPUT) != applied


def _remembered(store: Store, dataset: str, block: str) -> str:
    try:
        return store.read(_path(dataset, block)).decode()
    except FileNotFoundError:
        return ""


def _path(dataset: str, block: str) -> str:
    return ledger_path(dataset, "train", FOLDER, block).replace(".parquet", ".opt_out")
