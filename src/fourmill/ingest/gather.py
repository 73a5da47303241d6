"""Rows to pictures: an event loop, a Downloader and two decoding threads, kept over shards until they are closed.

Usual pictures are decoded on the loop's own thread, in bursts; what may take long is decoded in the threads.
"""

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fourmill.core.digest import digest_bytes
from fourmill.core.names import SampleKey, sample_key
from fourmill.core.shards import Item
from fourmill.ingest.at_hand import AtHandError, is_at_hand, read_at_hand
from fourmill.ingest.bursts import Bursts
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.download import Downloader, Fetched
from fourmill.ingest.event_loop import LoopThread
from fourmill.ingest.image import ImageError, normalise
from fourmill.ingest.kept import EXT
from fourmill.ingest.ordered import in_order
from fourmill.ingest.pixels import use_one_thread

_BURST = 16  # pictures in a row, at most a quarter of the slots
_BURST_BYTES = 2_000_000  # of JPEG, some 20 ms
_USUAL_BYTES = 1_000_000  # of a JPEG, some 10 ms
_DECODERS = 2  # threads, so that pictures of 50 million pixels do not add up to more than two at once
_STARTED_PER_SLOT = 4  # rows begun a download slot: some wait for a host's turn or a retry and hold no slot


class Gatherer:
    """Makes items of rows, many at once and in order.

    Memory: bodies in flight or being decoded, at most `concurrency` of them; finished images that wait for an earlier
    row, up to `waiting_mb` and those of the rows already begun.
    """

    def __init__(
        self, config: IngestConfig, source: SourceConfig | None, make_downloader: Callable[[], Downloader]
    ) -> None:
        """Prepare; threads and connections come with the first row.

        Args:
            source: where pictures at hand lie; None when there are none.
            make_downloader: called once, when the first URL is to be fetched.
        """
        self._config = config
        self._source = source
        self._make_downloader = make_downloader
        self._bursts = Bursts(max(1, min(_BURST, config.concurrency // 4)), _BURST_BYTES)
        self._open = _Open()
        self._opening = threading.Lock()
        self._finalizer = weakref.finalize(self, _close, self._open)  # also when the process ends

    def gather(self, rows: Sequence[dict[str, Any]]) -> Iterator[Item]:
        """Items of rows of the source index, in their order. One that is dropped half-way stops its downloads.

        Raises:
            RuntimeError: the gatherer is closed.
        """
        if not rows:
            return
        if not self._finalizer.alive:
            raise RuntimeError("this worker was closed; make another")
        use_one_thread()
        if any(not is_at_hand(row["url"]) for row in rows):
            self._open_downloader()
        yield from in_order(
            self._open.loop,
            rows,
            self._one,
            weigh=lambda item: len(item.data or b""),
            most_running=_STARTED_PER_SLOT * self._config.concurrency,
            most_waiting=self._config.waiting_mb * 1_000_000,
        )

    def close(self) -> None:
        """Close connections and end threads. May be called more than once."""
        self._finalizer()

    def _open_downloader(self) -> None:
        with self._opening:
            if self._open.downloader is None:
                downloader = self._make_downloader()
                self._open.loop.run(downloader.__aenter__())
                self._open.downloader = downloader

    async def _one(self, row: dict[str, Any]) -> Item:
        key, url = sample_key(row["row"]), row["url"]
        listed = {"url": url, "caption": row["caption"], **origin_of(row)}
        if is_at_hand(url):
            return await self._in_thread(self._at_hand, key, url, listed)
        downloader = self._open.downloader
        assert downloader is not None  # gather opened it
        async with downloader.held(url) as fetched:
            extra = {**listed, **_traces(fetched)}
            if fetched.status != "ok":
                return Item(key, fetched.status, fetched.reason, extra=extra)
            if _is_usual(fetched.data):
                return await self._bursts.call(len(fetched.data), self._picture, key, fetched.data, extra)
            return await self._in_thread(self._picture, key, fetched.data, extra)

    async def _in_thread(self, work: Callable[..., Item], *arguments: object) -> Item:
        return await asyncio.get_running_loop().run_in_executor(self._open.threads, work, *arguments)

    def _at_hand(self, key: SampleKey, url: str, extra: dict[str, Any]) -> Item:
        if self._source is None:
            raise ValueError(f"{url} is a picture at hand, but this worker was not told where they lie")
        try:
            data = read_at_hand(self._source, url, self._config.max_bytes)
        except AtHandError as error:
            return Item(key, error.status, error.reason, extra=extra)
        return self._picture(key, data, extra)

    def _picture(self, key: SampleKey, data: bytes, extra: dict[str, Any]) -> Item:
        source_sha256 = digest_bytes(data)
        arrived = {**extra, "bytes": len(data), "source_sha256": source_sha256}
        try:
            image = normalise(data, self._config)
        except ImageError as error:
            return Item(key, error.status, error.reason, extra=arrived)
        sha256 = source_sha256 if image.jpeg == data else digest_bytes(image.jpeg)
        sizes = {
            "sha256": sha256,
            "width": image.width,
            "height": image.height,
            "original_width": image.original_width,
            "original_height": image.original_height,
        }
        return Item(key, ext=EXT, data=image.jpeg, extra={**arrived, **sizes}, digest=sha256)


@dataclass
class _Open:
    """What has to be closed; apart from the gatherer, so that it can be closed when that is gone."""

    loop: LoopThread = field(default_factory=lambda: LoopThread("downloads"))
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_DECODERS, "decode"))
    downloader: Downloader | None = None


def origin_of(row: dict[str, Any]) -> dict[str, str]:
    """The `final_url` of a picture at hand whose source says where it was downloaded from; nothing for other rows."""
    return {"final_url": row["origin"]} if row.get("origin") else {}


def _close(opened: _Open) -> None:
    downloader, opened.downloader = opened.downloader, None
    if downloader is not None:
        opened.loop.run(downloader.__aexit__(None, None, None))
    opened.loop.close()
    opened.threads.shutdown(cancel_futures=True)


def _is_usual(data: bytes) -> bool:
    """A picture that is decoded in a few milliseconds, whatever it says of its size."""
    return len(data) <= _USUAL_BYTES and data.startswith(b"\xff\xd8")


def _traces(fetched: Fetched) -> dict[str, Any]:
    return {
        "final_url": fetched.final_url,
        "http_status": fetched.http_status,
        "content_type": fetched.content_type,
        "seconds": fetched.seconds,
        "attempts": fetched.attempts,
    }
