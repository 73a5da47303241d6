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

from fourmill.assets.result import FAILED
from fourmill.core.store import Store

State = Literal["ok", "missing", "failed", "stale", "waiting"]
Place = tuple[dg.AssetKey, str | None]
"""An asset, or one block of it."""
DATA_VERSION, INPUT_VERSION = "dagster/data_version", "dagster/input_data_version/"
"""Tags of a materialization; the second one ends with the name of an input."""
_INPUT_EVENT = "dagster/input_event_pointer/"


@dataclass(frozen=True)
class Node:
    """One asset, or one block of it."""

    key: dg.AssetKey
    partition: str | None
    state: State
    reason: str = ""
    behind: tuple[Place, ...] = ()  # what it is made of that is not "ok"

    @property
    def name(self) -> str:
        """`labels/depth`."""
        return self.key.to_user_string()


@dataclass(frozen=True)
class _Made:
    """A latest materialization: `inputs` are asset names to the data version and the storage id of the event that it saw.

    Of a parent with partitions the id is that of the last event of any of them.
    """

    storage_id: int
    version: str
    code_version: str
    inputs: Mapping[str, tuple[str, int]]
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
    nodes: dict[Place, Node] = {}
    for key in graph.toposorted_asset_keys:
        partitions_def = graph.get(key).partitions_def
        for partition in partitions_def.get_partition_keys() if partitions_def else [None]:
            place = key, partition
            made[place] = _latest(instance, key, partition)
            parents = list(_parents(graph, key, partition))
            behind = tuple(parent for parent in parents if nodes[parent].state != "ok")
            state, reason = _judge(made[place], graph.get(key).code_version, store)
            if state == "ok" and (why := _changed_parent(instance, made, place, parents)):
                state, reason = "stale", why
            if state == "ok" and place in outside:
                state, reason = "stale", outside[place]
            if state == "ok" and behind:
                state, reason = "waiting", f"behind {spoken(behind[0])}"
            nodes[place] = Node(key, partition, state, reason, behind)
    return list(nodes.values())


def _parents(graph: AssetGraph, key: dg.AssetKey, partition: str | None) -> Iterator[Place]:
    """Upstream places: the same block, or those that an unpartitioned asset gathers, as its mapping says."""
    for parent in sorted(graph.get(key).parent_keys):
        if graph.get(parent).partitions_def is None:
            yield parent, None
        else:
            mapped = graph.get_parent_partition_keys_for_child(partition, parent, key)
            yield from ((parent, p) for p in sorted(mapped.partitions_subset.get_partition_keys()))


def _latest(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> _Made | None:
    record = instance.get_latest_data_version_record(key, partition_key=partition)
    if record is None or record.asset_materialization is None:
        return None
    event = record.asset_materialization
    tags = event.tags or {}
    names = [tag.removeprefix(INPUT_VERSION) for tag in tags if tag.startswith(INPUT_VERSION)]
    inputs = {name: (tags[INPUT_VERSION + name], _event_id(tags.get(_INPUT_EVENT + name))) for name in names}
    ledger = event.metadata.get("ledger")
    files = tuple(str(ledger.value).split(", ")) if ledger else ()
    return _Made(record.storage_id, tags.get(DATA_VERSION, ""), tags.get("dagster/code_version", ""), inputs, files)


def _event_id(pointer: str | None) -> int:
    """The storage id in a tag; 0 where there was no event yet, which Dagster writes as a word."""
    return int(pointer) if pointer and pointer.isdecimal() else 0


def _judge(mine: _Made | None, code_version: str | None, store: Store) -> tuple[State, str]:
    """State and reason of a place as far as they do not depend on others."""
    if mine is None:
        return "missing", ""
    if mine.version.startswith(FAILED):
        return "failed", "a blocking check failed"
    gone = [file for file in mine.files if not store.exists(file)]
    if gone:
        return "missing", f"{gone[0]} is not there: a run that makes it anew has not come to its end, or it was deleted"
    if code_version and mine.code_version != code_version:
        return "stale", f"code version {mine.code_version} is now {code_version}"
    return "ok", ""


def _changed_parent(
    instance: dg.DagsterInstance, made: Mapping[Place, _Made | None], place: Place, parents: list[Place]
) -> str:
    """What has happened to the first parent that is not what a place was made of; empty where all are."""
    mine = made[place]
    for parent in parents:
        theirs = made[parent]
        if mine is None or theirs is None or theirs.version.startswith(FAILED):
            continue  # of what failed nothing is made: the one before it goes on serving
        seen = mine.inputs.get(parent[0].to_user_string())
        if seen is None:
            return f"{spoken(parent)} is a new input"
        if theirs.version != _seen_version(instance, parent, theirs, *seen):
            return f"{spoken(parent)} has changed"
    return ""


def _seen_version(instance: dg.DagsterInstance, parent: Place, now: _Made, version: str, event_id: int) -> str:
    """The data version that a parent had for whoever saw these.

    Of a block, what it had after the last event then: what is recorded is one hash over all blocks that were read.
    """
    key, partition = parent
    if partition is None:
        return version
    if now.storage_id <= event_id:
        return now.version
    record = instance.get_latest_data_version_record(key, partition_key=partition, before_cursor=event_id + 1)
    event = record.asset_materialization if record else None
    return (event.tags or {}).get(DATA_VERSION, "") if event else ""


def spoken(place: Place) -> str:
    """`labels/depth block_00`."""
    return " ".join(filter(None, [place[0].to_user_string(), place[1]]))
