"""The stage `images`: rows of one shard and split to pictures, every row with one status."""

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from fourmill.core.digest import digest_bytes, digest_config
from fourmill.core.names import Layout, Split, sample_key
from fourmill.core.shards import Item, Receipt, Recipe, ShardPlace, write_shard
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.ingest.config import NO_EFFECT_ON_CONTENT, VERSION, IngestConfig
from fourmill.ingest.download import Downloader, Fetched
from fourmill.ingest.duplicates import FOLDER, finish_block
from fourmill.ingest.image import ImageError, normalise
from fourmill.ingest.source import read_source_rows, shard_source_digest

__all__ = ["FOLDER", "IMAGE_COLUMNS", "ImageWorker", "finish_block", "images_recipe"]

IMAGE_COLUMNS = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("final_url", pa.string()),  # after redirects
        ("http_status", pa.int32()),
        ("bytes", pa.int64()),  # received
        ("sha256", pa.string()),  # of the stored image, kept when the row turns out a duplicate
        ("width", pa.int32()),  # of the stored image, pixels
        ("height", pa.int32()),
        ("original_width", pa.int32()),  # upright, before it was reduced
        ("original_height", pa.int32()),
        ("seconds", pa.float64()),  # spent on the download, waits included
        ("attempts", pa.int32()),
        ("duplicate_of", pa.string()),  # sample key of the first row with the same bytes
    ]
)
_DECODERS = 2  # threads, so that pictures of 50 million pixels do not add up to more than two at once


def images_recipe(store: Store, dataset: str, layout: Layout, config: IngestConfig, split: Split, shard: int) -> Recipe:
    """What a shard of images depends on: its rows of the list and what images become; not the pace of downloads.

    Raises:
        ValueError: the dataset has no numbered list.
    """
    return Recipe(
        stage=FOLDER,
        code_version=VERSION,
        config=digest_config(config, exclude=NO_EFFECT_ON_CONTENT),
        inputs={"source": shard_source_digest(store, dataset, shard)},
    )


class ImageWorker:
    """Downloads shards of images; a `core.work.ShardWorker`.

    Holds the stored images of one shard and split at a time: at most `rows_per_shard` of them, a few hundred kB each.
    """

    def __init__(
        self,
        store_root: str,
        dataset: str,
        layout: Layout,
        config: IngestConfig,
        connect_to: Mapping[str, str] | None = None,
    ) -> None:
        """Make a worker.

        Args:
            connect_to: "host:port" of URLs to "address:port" to connect to instead, see `download.Downloader`.
        """
        self._store = open_store(store_root)
        self._dataset = dataset
        self._layout = layout
        self._config = config
        self._connect_to = dict(connect_to or {})

    def run(self, job: ShardJob) -> Receipt:
        """Make one shard whole: download its rows of one split; a shard past the end of the list has none.

        Raises:
            ValueError: the dataset has no numbered list, or it was numbered for another layout.
        """
        place = ShardPlace(self._dataset, job.split, FOLDER, job.shard)
        rows = read_source_rows(self._store, self._dataset, job.shard).to_pylist()
        if rows and rows[0]["row"] != self._layout.rows_of(job.shard).start:
            raise ValueError(
                f"shard {job.shard} of the list begins at row {rows[0]['row']}, this layout expects "
                f"{self._layout.rows_of(job.shard).start}: materialize {self._dataset}/source_index again"
            )
        mine = [row for row in rows if row["split"] == job.split]
        return write_shard(self._store, place, job.recipe, self._items(mine), job.run_id, IMAGE_COLUMNS)

    def _items(self, rows: list[dict[str, Any]]) -> Iterator[Item]:
        # A generator, so that the downloads count into the receipt's seconds.
        yield from asyncio.run(self._fetch_all(rows)) if rows else ()

    async def _fetch_all(self, rows: list[dict[str, Any]]) -> list[Item]:
        slots = asyncio.Semaphore(self._config.concurrency)
        with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as decoders:
            async with Downloader(self._config, self._connect_to) as downloader:

                async def one(row: dict[str, Any]) -> Item:
                    async with slots:
                        return await self._fetch_row(row, downloader, decoders)

                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(row)) for row in rows]
        return [task.result() for task in tasks]

    async def _fetch_row(self, row: dict[str, Any], downloader: Downloader, decoders: ThreadPoolExecutor) -> Item:
        key = sample_key(row["row"])
        listed = {"url": row["url"], "caption": row["caption"]}
        if row["status"] != "ok":
            return Item(key, row["status"], row["reason"], extra=listed)
        fetched = await downloader.fetch(row["url"])
        extra = {**listed, **_traces(fetched)}
        if fetched.status != "ok":
            return Item(key, fetched.status, fetched.reason, extra=extra)
        try:
            loop = asyncio.get_running_loop()
            image = await loop.run_in_executor(decoders, normalise, fetched.data, self._config)
        except ImageError as error:
            return Item(key, error.status, error.reason, extra=extra)
        extra |= {
            "sha256": digest_bytes(image.jpeg),
            "width": image.width,
            "height": image.height,
            "original_width": image.original_width,
            "original_height": image.original_height,
        }
        return Item(key, ext="jpg", data=image.jpeg, extra=extra)


def _traces(fetched: Fetched) -> dict[str, Any]:
    return {
        "final_url": fetched.final_url,
        "http_status": fetched.http_status,
        "bytes": len(fetched.data) if fetched.status == "ok" else None,
        "seconds": fetched.seconds,
        "attempts": fetched.attempts,
    }
