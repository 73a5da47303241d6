"""What has changed outside of the graph: lists and opt-out lists that people edit, files that they delete. Dagster sees no file."""

import dagster as dg

from fourmill.core.store import Store
from fourmill.ingest.optout import read_opt_out
from fourmill.ingest.source import is_current
from fourmill.ingest.stale import blocks_to_rebuild
from fourmill.pipelines.lost import is_numbered, lost_files
from fourmill.pipelines.status import Place
from fourmill.runtime.project import Project


def changed_outside(project: Project, store: Store) -> dict[Place, str]:
    """What is to be made again because a file outside of the store is another one, or one in it is gone, and why.

    Raises:
        ValueError: a list or an opt-out list cannot be read; the message says which.
    """
    return {**lost_files(project, store), **changed_lists(project, store), **changed_opt_outs(project, store)}


def changed_lists(project: Project, store: Store) -> dict[Place, str]:
    """Numbered lists that are not their file any more; one whose size, time or ETag has changed is read whole."""
    return {
        (dg.AssetKey([dataset.name, "source_index"]), None): "the list has changed"
        for dataset in project.datasets()
        if is_numbered(store, dataset) and not is_current(store, dataset.name, dataset.source)
    }


def changed_opt_outs(project: Project, store: Store) -> dict[Place, str]:
    """Blocks of images that the opt-out list reaches and that were made by another one.

    Raises:
        ValueError: the opt-out list cannot be read; the message says which line.
    """
    return {
        (dg.AssetKey([dataset.name, "images"]), block): "the opt-out list has changed"
        for dataset in project.datasets()
        if is_numbered(store, dataset)
        for block in blocks_to_rebuild(store, dataset.name, dataset.layout, read_opt_out(dataset.ingest.opt_out))
    }
