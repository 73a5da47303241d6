"""What was made and is gone from the store since: numbered lists, receipts, tars and manifests that somebody deleted."""

from collections.abc import Iterator

import dagster as dg

from fourmill.assets.labels import label_key
from fourmill.assets.training import MANIFEST
from fourmill.core.modality import IMAGE_TOKENS
from fourmill.core.names import SPLITS
from fourmill.core.shards import places_of, read_receipt
from fourmill.core.store import Store
from fourmill.ingest.source import read_source
from fourmill.pipelines.status import Place
from fourmill.pseudolabel.members import label_format
from fourmill.runtime.manifests import manifest_is_whole
from fourmill.runtime.models import FOURM_ASSETS, ModelMissingError, current, pointer_path
from fourmill.runtime.project import DatasetConfig, Project
from fourmill.runtime.token_assets import token_assets
from fourmill.runtime.training import train_set_asset
from fourmill.tokenize.align import FOLDER as ALIGNED
from fourmill.tokenize.align import token_folder


def lost_files(project: Project, store: Store) -> dict[Place, str]:
    """Places of the graph that lack a file in the store, and which; some of them may never have been made."""
    lost: dict[Place, str] = {}
    for dataset in project.datasets():
        if not is_numbered(store, dataset):
            lost[dg.AssetKey([dataset.name, "source_index"]), None] = "its numbered list is gone from the store"
        for key, folder in _folders(project, dataset):
            lost |= {(key, block): why for block, why in _lost_of_folder(store, dataset, folder)}
    if not manifest_is_whole(store, project.dataset):
        lost[MANIFEST, None] = "its file is gone from the store, or is not what its name says"
    for name, asset in _models(project):
        if not _serves(store, project.dataset, name):
            lost[dg.AssetKey(asset.split("/")), None] = f"{pointer_path(project.dataset, name)} is gone or damaged"
    return lost


def _models(project: Project) -> Iterator[tuple[str, str]]:
    """What is kept under its digest, with a file that names the one that serves; and the asset that writes this file."""
    for name in (None, *project.more_train_sets):
        asset = train_set_asset(name)
        yield asset.rpartition("/")[2], asset
    yield from ((name, f"tokenizers/{name}") for name in (*IMAGE_TOKENS, "text"))
    yield from ((name, asset) for name, asset in FOURM_ASSETS.items() if name != "superres" or project.superres)


def _serves(store: Store, dataset: str, name: str) -> bool:
    try:
        current(store, dataset, name, "")
    except ModelMissingError:
        return False
    return True


def is_numbered(store: Store, dataset: DatasetConfig) -> bool:
    """Whether the store has a dataset's numbered list."""
    try:
        read_source(store, dataset.name)
    except ValueError:
        return False
    return True


def _folders(project: Project, dataset: DatasetConfig) -> Iterator[tuple[dg.AssetKey, str]]:
    """Assets that are made block by block, and the folder that each fills."""
    is_main = dataset.name == project.dataset
    yield dg.AssetKey([dataset.name, "images"]), "images"
    for label in project.stored_labels():
        yield label_key(label, "" if is_main else dataset.name), label_format(label).folder
    if is_main:
        for name, asset in token_assets(project).items():
            yield dg.AssetKey(["tokens", name]), token_folder(asset.modality)
        yield dg.AssetKey(["tokens", "shards"]), ALIGNED


def _lost_of_folder(store: Store, dataset: DatasetConfig, folder: str) -> Iterator[tuple[str, str]]:
    """Blocks that lack a file of a folder, and which: by listing the folder, and reading receipts without a tar only."""
    there = {path for split in SPLITS for path in store.list(f"{dataset.name}/{split}/{folder}")}
    for block in dataset.layout.block_keys():
        for place in places_of(dataset.name, dataset.layout, block, folder):
            receipt = read_receipt(store, place) if place.receipt in there and place.tar not in there else None
            if place.receipt not in there or (receipt is not None and receipt.tar_sha256 is not None):
                yield block, f"{place.receipt if receipt is None else place.tar} is gone from the store"
                break
