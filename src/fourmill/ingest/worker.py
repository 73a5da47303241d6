"""The stage `images`: rows of one shard and split to pictures, every row with one status."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from itertools import chain
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from fourmill.core.digest import digest_config
from fourmill.core.names import Layout, SampleKey, Split, sample_key
from fourmill.core.shards import (
    Item,
    Receipt,
    Recipe,
    ShardPlace,
    finished,
    write_receipt,
    write_shard,
)
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.ingest.at_hand import is_at_hand
from fourmill.ingest.config import NO_EFFECT_ON_CONTENT, VERSION, IngestConfig, SourceConfig
from fourmill.ingest.download import Downloader
from fourmill.ingest.duplicates import FOLDER, finish_block
from fourmill.ingest.gather import Gatherer, origin_of
from fourmill.ingest.hosts import HostLimits
from fourmill.ingest.kept import KeptShard, Members, item_of
from fourmill.ingest.optout import INPUT, OptOut, entries_of, entry_of, input_digest, published_opt_out
from fourmill.ingest.source import read_source_rows, shard_source_digest
from fourmill.ingest.stale import opt_out_input
from fourmill.ingest.statuses import STATUSES, may_pass

__all__ = ["FOLDER", "IMAGE_COLUMNS", "ImageWorker", "finish_block", "images_recipe"]

IMAGE_COLUMNS = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("final_url", pa.string()),  # after redirects; of a picture at hand where it once came from, if its tar says so
        ("http_status", pa.int32()),
        ("content_type", pa.string()),  # as the server claims it
        ("bytes", pa.int64()),  # received
        ("source_sha256", pa.string()),  # of the bytes received; null when they did not arrive whole
        ("sha256", pa.string()),  # of the stored image, kept when the row turns out a duplicate or is opted out
        ("width", pa.int32()),  # of the stored image, pixels
        ("height", pa.int32()),
        ("original_width", pa.int32()),  # upright, before it was reduced
        ("original_height", pa.int32()),
        ("seconds", pa.float64()),  # spent on the download, waits included
        ("attempts", pa.int32()),
        ("duplicate_of", pa.string()),  # sample key of the first row with the same bytes
    ]
)


def images_recipe(
    store: Store,
    dataset: str,
    config: IngestConfig,
    split: Split,
    shard: int,
    opt_out: OptOut | None = None,
) -> Recipe:
    """What a shard of images depends on: its rows of the list and what images become; not the pace of downloads.

    Entries of the opt-out list are an input of the shards whose rows they match, and of no other.

    Raises:
        ValueError: the dataset has no numbered list.
    """
    inputs = {"source": shard_source_digest(store, dataset, shard)}
    if opt_out is not None:
        inputs |= opt_out_input(store, dataset, split, shard, opt_out)
    return Recipe(
        stage=FOLDER,
        code_version=VERSION,
        config=digest_config(config, exclude=NO_EFFECT_ON_CONTENT),
        inputs=inputs,
    )


class ImageWorker:
    """Downloads shards of images; a `core.work.ShardWorker`, kept over shards, connections and all.

    A shard that is made again keeps what it has, as far as code, settings and a row's URL are the same: images keep
    their bytes, failures stay, and only rows without an outcome are fetched. With `retry_failed` failures that may have
    passed are fetched too; a finished shard that gains nothing by it is left untouched. Rows that the opt-out list names
    lose their image, or are never asked for.
    """

    def __init__(
        self,
        store_root: str,
        dataset: str,
        layout: Layout,
        config: IngestConfig,
        connect_to: Mapping[str, str] | None = None,
        *,
        source: SourceConfig | None = None,
        opt_out: str = "",
        retry_failed: bool = False,
        host_limits: HostLimits | None = None,
    ) -> None:
        """Make a worker.

        Args:
            connect_to: "host:port" of URLs to "address:port" to connect to instead, see `download.Downloader`.
            source: where pictures at hand lie.
            opt_out: digest of a list that was published in the store; "" for none.
            retry_failed: fetch failed rows again where another try may do.
            host_limits: who counts the requests to a host, over all workers; closed with the worker.
        """
        self._store = open_store(store_root)
        self._dataset = dataset
        self._layout = layout
        self._opt_out = published_opt_out(store_root, opt_out)
        self._retry_failed = retry_failed
        routes = dict(connect_to or {})
        self._gatherer = Gatherer(config, source, lambda: Downloader(config, routes, host_limits=host_limits))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and end threads; also done when the worker is forgotten or its process ends."""
        self._gatherer.close()

    def run(self, job: ShardJob) -> Receipt:
        """Make one shard whole: its rows of one split; a shard past the end of the list has none.

        Raises:
            ValueError: the dataset has no numbered list, or it was numbered for another layout.
        """
        place = ShardPlace(self._dataset, job.split, FOLDER, job.shard)
        rows = self._listed(job)
        kept = KeptShard(self._store, place, job.recipe)
        entries = entries_of(self._opt_out, rows, kept.rows)
        settled = {sample_key(row["row"]): self._settled(row, kept, entries) for row in rows}
        missing = [row for row in rows if settled[sample_key(row["row"])] is None]
        fetched = self._judged_all(self._gatherer.gather(missing), entries)
        done = finished(self._store, place, job.recipe) if self._retry_failed else None
        if done is not None:
            looked_at = _up_to_a_gain(fetched)
            if not any(item.status == "ok" for item in looked_at):
                return done
            fetched = chain(looked_at, fetched)
        with closing(Members(self._store, place)) as members:
            items = self._items(rows, settled, fetched, members, entries)
            receipt = write_shard(self._store, place, job.recipe, items, job.run_id, IMAGE_COLUMNS, STATUSES)
        return self._stamped(place, receipt, entries)

    def _listed(self, job: ShardJob) -> list[dict[str, Any]]:
        rows = read_source_rows(self._store, self._dataset, job.shard).to_pylist()
        first = self._layout.rows_of(job.shard).start
        if rows and rows[0]["row"] != first:
            raise ValueError(
                f"shard {job.shard} of the list begins at row {rows[0]['row']}, this layout expects {first}: "
                f"materialize {self._dataset}/source_index again"
            )
        return [row for row in rows if row["split"] == job.split]

    def _settled(self, row: dict[str, Any], kept: KeptShard, entries: Mapping[str, str]) -> dict[str, Any] | None:
        """A row that needs no fetching, as the ledger will have it; None for one that does."""
        key = sample_key(row["row"])
        listed = {"key": key, "url": row["url"], "caption": row["caption"], "digest": None, **origin_of(row)}
        before = kept.rows.get(key)
        if before is not None and before["url"] != row["url"]:
            before = None
        if row["status"] != "ok":
            return {**listed, "status": row["status"], "reason": row["reason"]}
        if key in entries:
            return {**(before or {}), **listed, **_opted_out(entries[key])}
        if before is None or before["status"] in ("opted_out", "bad_row"):
            return None
        if before["status"] == "ok" and not kept.has_tar:
            return None
        if not kept.same_source and (before["status"] == "duplicate" or is_at_hand(row["url"])):
            return None  # what it repeats, or the file behind the address, may be another now
        arrived = before["source_sha256"] is not None
        if self._retry_failed and may_pass(before["status"], before["http_status"], arrived):
            return None
        return {**before, "caption": row["caption"]}

    def _items(
        self,
        rows: list[dict[str, Any]],
        settled: Mapping[SampleKey, dict[str, Any] | None],
        fetched: Iterator[Item],
        members: Members,
        entries: dict[str, str],
    ) -> Iterator[Item]:
        again: Iterator[Item] = iter(())
        for index, row in enumerate(rows):
            key = sample_key(row["row"])
            known = settled[key]
            if known is None:
                yield next(fetched)
                continue
            data = members.take(key, known["digest"]) if known["status"] == "ok" else None
            if known["status"] != "ok" or data is not None:
                yield item_of(known, data)
                continue
            item = next(again, None)
            if item is None:  # the tar has lost this image, or is cut and has lost all that follow
                last = len(rows) if members.at_end else index + 1
                lost = [
                    one for one in rows[index:last] if (settled[sample_key(one["row"])] or {}).get("status") == "ok"
                ]
                again = self._judged_all(self._gatherer.gather(lost), entries)
                item = next(again)
            yield item

    def _judged_all(self, items: Iterable[Item], entries: dict[str, str]) -> Iterator[Item]:
        return (self._judged(item, entries) for item in items)

    def _judged(self, item: Item, entries: dict[str, str]) -> Item:
        """A fetched item, unless the list names where it was found or what it is."""
        entry = entry_of(self._opt_out, item.extra["url"], item.extra) if self._opt_out else None
        if entry is None:
            return item
        entries[item.key] = entry
        gone = _opted_out(entry)
        return Item(item.key, gone["status"], gone["reason"], extra=item.extra)

    def _stamped(self, place: ShardPlace, receipt: Receipt, entries: Mapping[str, str]) -> Receipt:
        """The receipt by the recipe that the shard has now: entries may have met rows that nobody had seen before."""
        inputs = {name: digest for name, digest in receipt.recipe.inputs.items() if name != INPUT}
        inputs |= {INPUT: input_digest(entries)} if entries else {}
        if inputs == receipt.recipe.inputs:
            return receipt
        stamped = receipt.model_copy(update={"recipe": receipt.recipe.model_copy(update={"inputs": inputs})})
        write_receipt(self._store, place, stamped)
        return stamped


def _up_to_a_gain(items: Iterator[Item]) -> list[Item]:
    """Failures until the first image, and that; few bytes, since failures hold none."""
    looked_at: list[Item] = []
    for item in items:
        looked_at.append(item)
        if item.status == "ok":
            break
    return looked_at


def _opted_out(entry: str) -> dict[str, str]:
    return {"status": "opted_out", "reason": f"{entry} is on the opt-out list"}
