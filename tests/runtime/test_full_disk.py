"""A disk that fills up under a block of downloads: said in full, nothing half-made, and the next run finishes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourmill.core.ledger import BlockReport, write_ledger
from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import ShardPlace, finished
from fourmill.core.store import Store, StoreFullError, open_store
from fourmill.core.work import ShardJob
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.duplicates import finish_block
from fourmill.ingest.source import build_source_index
from fourmill.ingest.worker import ImageWorker, images_recipe
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.pool import ShardError
from fourmill.runtime.session import Session
from fourmill.runtime.stages import images_stage, publish_ledger, run_block

LAYOUT = Layout(rows_per_shard=8, shards_per_block=6, num_blocks=1)
CONFIG = IngestConfig(retry_wait_s=0.0, max_retry_wait_s=0.0)
DATASET = "pics"


def make(root: str, pictures: Any) -> BlockReport:
    """What the runtime does with a block, in this process."""
    store = open_store(root)
    build_source_index(store, DATASET, SourceConfig(list=str(pictures.list), val_fraction=0.25), LAYOUT)
    with ImageWorker(root, DATASET, LAYOUT, CONFIG, pictures.connect_to) as worker:
        for shard in LAYOUT.shards_of("block_00"):
            for split in reversed(SPLITS):  # the small ones first
                recipe = images_recipe(store, DATASET, CONFIG, split, shard)
                if not finished(store, ShardPlace(DATASET, split, "images", shard), recipe):
                    worker.run(ShardJob(split, shard, recipe, "run"))
    finish_block(store, DATASET, LAYOUT, "block_00")
    return write_ledger(store, DATASET, "images", "block_00", LAYOUT.shards_of("block_00"), "pics/images", 0)


def all_whole(store: Store, dataset: str, config: IngestConfig, layout: Layout) -> int:
    """Every tar of the store is one that a receipt stands for; returns how many shards are done."""
    done, tars = 0, set()
    for shard in layout.shards_of("block_00"):
        for split in SPLITS:
            place = ShardPlace(dataset, split, "images", shard)
            receipt = finished(store, place, images_recipe(store, dataset, config, split, shard))
            done += receipt is not None
            tars |= {place.tar} if receipt and receipt.tar_sha256 else set()
    assert {path for path in store.list(dataset) if path.endswith(".tar")} == tars
    return done


def test_a_full_disk_stops_the_block_and_the_next_run_finishes_it(
    small_disk: Callable[[int, int], Any], pictures: Any, tmp_path: Path
) -> None:
    undisturbed = make(str(tmp_path / "large"), pictures)
    disk = small_disk(400_000, 80_000)
    with pytest.raises(StoreFullError, match=rf"no room for {disk.folder}/pics/.* it needs at least [\d,]+ bytes"):
        make(str(disk.folder), pictures)
    assert 0 < all_whole(open_store(str(disk.folder)), DATASET, CONFIG, LAYOUT) < 12
    assert not list(disk.folder.rglob("*.tmp"))
    disk.enlarge()
    again = make(str(disk.folder), pictures)
    assert again.digest == undisturbed.digest and again.counts == undisturbed.counts
    assert all_whole(open_store(str(disk.folder)), DATASET, CONFIG, LAYOUT) == 12


@pytest.mark.ray
def test_an_actor_without_room_is_heard_in_full(pictures: Any, tmp_path: Path, ray_session: None) -> None:
    base = smallest(tmp_path)
    changes = {
        "layout": LAYOUT,
        "ingest": CONFIG,
        "source": base.source.model_copy(update={"list": str(pictures.list)}),
    }

    def session(store: str) -> Session:
        return Session(base.model_copy(update={**changes, "store": store}), "run", pictures.connect_to)

    def run(session: Session, longest_file: int) -> BlockReport:
        p = session.project
        build_source_index(session.store, p.dataset, p.source, p.layout)
        stage = images_stage(session)
        arguments = {**stage.arguments, "longest_file": longest_file}
        stage = dataclasses.replace(stage, factory="limited_images:images", arguments=arguments)
        return publish_ledger(session, stage, "block_00", run_block(session, stage, "block_00"))

    undisturbed = run(session(str(tmp_path / "large")), -1)
    small = session(str(tmp_path / "small"))
    words = rf"images train shard \d{{5}}: no room for {tmp_path}/small/cc12m/train/images/shard-\d{{5}}\.tar \(File too large\): "
    with pytest.raises(
        ShardError, match=words + r"it needs at least [\d,]{6,} bytes.*`ulimit -f`.*the next run goes on"
    ):
        run(small, 80_000)
    again = run(small, -1)
    assert not list((tmp_path / "small").rglob("*.tmp"))
    assert again.digest == undisturbed.digest and again.counts == undisturbed.counts
    assert all_whole(small.store, "cc12m", CONFIG, LAYOUT) == 12
