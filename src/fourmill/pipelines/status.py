"""What is there, what is missing, what is stale: block by block, from Dagster's own events.

Dagster's global graph does not show staleness of single partitions; this does, by the same rule: an asset is stale when
its code version changed, or when the data version of something upstream is not the one it was made from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph import (
    AssetGraph,
)  # what Definitions.resolve_asset_graph returns

from fourmill.core.digest import digest_bytes
from fourmill.core.store import Store

State = Literal["ok", "missing", "failed", "stale", "waiting"]
Place = tuple[dg.AssetKey, str | None]
"""An asset, or one block of it."""
_INPUT_VERSION = "dagster/input_data_version/"


@dataclass(frozen=True)
class Node:
    """One asset, or one block of it."""

    key: dg.AssetKey
    partition: str | None
    state: State
    reason: str = ""

    @property
    def name(self) -> str:
        """`labels/depth`."""
        return self.key.to_user_string()


@dataclass(frozen=True)
class _Made:
    storage_id: int
    version: str
    code_version: str
    inputs: Mapping[str, str]
    files: tuple[str, ...]


def read_status(
    graph: AssetGraph, instance: dg.DagsterInstance, store: Store, changed: Mapping[Place, str] | None = None
) -> list[Node]:
    """Every asset and block in topological order with its state.

    "waiting" is an asset that is as it should be, but stands behind one that is not.

    Args:
        changed: places whose inputs from outside have changed, and what has; Dagster cannot know of those.
    """
    outside = changed or {}
    made: dict[Place, _Made | None] = {}
    states: dict[Place, Node] = {}
    for key in graph.toposorted_asset_keys:
        partitions_def = graph.get(key).partitions_def
        for partition in partitions_def.get_partition_keys() if partitions_def else [None]:
            made[key, partition] = _latest(instance, key, partition)
            parents = list(_parents(graph, key, partition))
            code = graph.get(key).code_version
            node = _judge(key, partition, code, made, states, parents, store)
            if node.state in ("ok", "waiting") and (key, partition) in outside:
                node = Node(key, partition, "stale", outside[key, partition])
            states[key, partition] = node
    return list(states.values())


def _parents(graph: AssetGraph, key: dg.AssetKey, partition: str | None) -> Iterator[Place]:
    """Upstream nodes: the same block, or all blocks where an unpartitioned asset gathers them."""
    for parent in sorted(graph.get(key).parent_keys):
        partitions_def = graph.get(parent).partitions_def
        if partitions_def is None:
            yield parent, None
        elif partition is not None:
            yield parent, partition
        else:
            yield from ((parent, p) for p in partitions_def.get_partition_keys())


def _latest(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> _Made | None:
    record = instance.get_latest_data_version_record(key, partition_key=partition)
    if record is None or record.asset_materialization is None:
        return None
    event = record.asset_materialization
    tags = event.tags or {}
    inputs = {k.removeprefix(_INPUT_VERSION): v for k, v in tags.items() if k.startswith(_INPUT_VERSION)}
    ledger = event.metadata.get("ledger")
    files = tuple(str(ledger.value).split(", ")) if ledger else ()
    version, code = tags.get("dagster/data_version", ""), tags.get("dagster/code_version", "")
    return _Made(record.storage_id, version, code, inputs, files)


def _was_input(recorded: str | None, version: str) -> bool:
    """Whether a recorded input version is this one; Dagster keeps a partition's as a hash over the partitions read."""
    return recorded is None or recorded in (version, digest_bytes(version.encode()))


def _judge(
    key: dg.AssetKey,
    partition: str | None,
    code_version: str | None,
    made: Mapping[Place, _Made | None],
    states: Mapping[Place, Node],
    parents: list[Place],
    store: Store,
) -> Node:
    mine = made[key, partition]
    if mine is None:
        return Node(key, partition, "missing")
    if mine.version.startswith("failed-"):
        return Node(key, partition, "failed", "a blocking check failed")
    gone = [file for file in mine.files if not store.exists(file)]
    if gone:
        return Node(key, partition, "missing", f"{gone[0]} is gone from the store")
    if code_version and mine.code_version != code_version:
        return Node(key, partition, "stale", f"code version {mine.code_version} is now {code_version}")
    for parent, parent_partition in parents:
        theirs = made[parent, parent_partition]
        fan_in = partition is None and parent_partition is not None
        name = parent.to_user_string()
        # Dagster keeps one version of a fan-in's many inputs; the order of events tells whether one of them is newer.
        if theirs is None:
            continue
        changed = (
            theirs.storage_id > mine.storage_id if fan_in else not _was_input(mine.inputs.get(name), theirs.version)
        )
        if changed:
            return Node(key, partition, "stale", f"{name} {parent_partition or ''} has changed".replace("  ", " "))
    for parent in parents:
        if parent in states and states[parent].state != "ok":
            return Node(key, partition, "waiting", f"behind {states[parent].name} {parent[1] or ''}".rstrip())
    return Node(key, partition, "ok")
