"""Every data version of a project in one dictionary: what two runs are compared by."""

from pathlib import Path

from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.runner import open_instance
from fourmill.pipelines.workspace import Workspace


def all_digests(out: Path) -> dict[str, str]:
    """Asset (and block) to the data version of its latest materialization; what is missing is left out."""
    workspace = Workspace(out)
    graph = build_definitions(workspace.project()).resolve_asset_graph()
    found: dict[str, str] = {}
    with open_instance(workspace.home) as instance:
        for key in graph.toposorted_asset_keys:
            partitions = graph.get(key).partitions_def
            for partition in partitions.get_partition_keys() if partitions else [None]:
                record = instance.get_latest_data_version_record(key, partition_key=partition)
                made = record.asset_materialization if record else None
                if made is not None:
                    name = " ".join(filter(None, [key.to_user_string(), partition]))
                    found[name] = (made.tags or {}).get("dagster/data_version", "")
    return found
