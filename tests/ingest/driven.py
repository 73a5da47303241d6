"""Ingest as the runtime drives it: a store, a list and a worker; and small images for it."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fourmill.core.ledger import BlockReport, ledger_path, write_ledger
from fourmill.core.names import SPLITS, Layout
from fourmill.core.shards import ShardPlace, finished, read_rows
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.duplicates import finish_block
from fourmill.ingest.optout import OptOut, publish_opt_out, read_opt_out
from fourmill.ingest.source import build_source_index
from fourmill.ingest.stale import remember_opt_out
from fourmill.ingest.statuses import MAY_PASS
from fourmill.ingest.worker import ImageWorker, images_recipe
from tests.ingest.server import Site


def quick_config(**changes: object) -> IngestConfig:
    """Defaults for tests: no waiting between attempts."""
    return IngestConfig.model_validate({"retry_wait_s": 0.0, "max_retry_wait_s": 0.0, **changes})


def jpeg(seed: int, width: int = 24, height: int = 16, **options: object) -> bytes:
    """A small JPEG; another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    sink = io.BytesIO()
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    image.save(sink, "JPEG", quality=90, **options)  # pyright: ignore[reportArgumentType]
    return sink.getvalue()


@dataclass
class Ingest:
    """A store, a list and a worker, driven as the runtime drives them."""

    folder: Path
    site: Site
    layout: Layout = field(default_factory=lambda: Layout(rows_per_shard=4, shards_per_block=2, num_blocks=2))
    config: IngestConfig = field(default_factory=quick_config)
    val_fraction: float = 0.4
    dataset: str = "pics"

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.folder / "store")

    def number(self, lines: list[str]):
        path = self.folder / "list.tsv"
        path.write_text("".join(f"{line}\n" for line in lines))
        source = SourceConfig(list=str(path), val_fraction=self.val_fraction)
        return build_source_index(self.store, self.dataset, source, self.layout)

    @property
    def opt_out(self) -> OptOut:
        return read_opt_out(self.config.opt_out)

    def recipe(self, split, shard: int):
        return images_recipe(self.store, self.dataset, self.config, split, shard, self.opt_out)

    def worker(self, retry_failed: bool = False) -> ImageWorker:
        digest = publish_opt_out(self.store, self.opt_out)
        where = (self.store.root, self.dataset, self.layout, self.config, self.site.connect_to)
        return ImageWorker(*where, opt_out=digest, retry_failed=retry_failed)

    def run(self, block: str, run_id: str = "run", retry_failed: bool = False) -> BlockReport:
        shards, made = self.layout.shards_of(block), 0
        with self.worker(retry_failed) as worker:
            for shard in shards:
                for split in SPLITS:
                    recipe = self.recipe(split, shard)
                    done = finished(self.store, ShardPlace(self.dataset, split, "images", shard), recipe)
                    if done is None or (retry_failed and not MAY_PASS.isdisjoint(done.counts)):
                        for one in SPLITS:
                            self.store.delete(ledger_path(self.dataset, one, "images", block))
                        made += worker.run(ShardJob(split, shard, recipe, run_id)) != done
        finish_block(self.store, self.dataset, self.layout, block)
        remember_opt_out(self.store, self.dataset, block, self.opt_out)
        return write_ledger(self.store, self.dataset, "images", block, shards, "pics/images", made)

    def rows(self) -> dict[int, dict]:
        """All rows of all done shards, by row number."""
        found: dict[int, dict] = {}
        for shard in range(self.layout.shards_per_block * self.layout.num_blocks):
            for split in SPLITS:
                place = ShardPlace(self.dataset, split, "images", shard)
                if self.store.exists(place.rows):
                    for row in read_rows(self.store, place).to_pylist():
                        assert int(row["key"]) not in found
                        found[int(row["key"])] = {**row, "split": split}
        return found

    def files(self) -> dict[str, bytes]:
        return {path: self.store.read(path) for path in self.store.list(self.dataset)}
