"""A worker of the runtime's tests that downloads within the cluster's limit per host; lives in an actor of its own."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

from fourmill.ingest.config import IngestConfig
from fourmill.ingest.download import Downloader
from fourmill.runtime.host_limits import cluster_host_limits


class PoliteWorker:
    """Fetches URLs in an event loop on a thread, as `ImageWorker` does, limited together with all other workers."""

    def pid(self) -> int:
        return os.getpid()

    def fetch(self, urls: list[str], connect_to: dict[str, str], per_host: int) -> list[str]:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, _fetch(urls, connect_to, per_host)).result()


async def _fetch(urls: list[str], connect_to: dict[str, str], per_host: int) -> list[str]:
    config = IngestConfig(per_host=per_host, retries=0, total_timeout_s=600, first_byte_timeout_s=600)
    limits = cluster_host_limits(per_host, config.concurrency)
    assert limits
    async with Downloader(config, connect_to, host_limits=limits) as downloader:
        return [one.status for one in await asyncio.gather(*(downloader.fetch(url) for url in urls))]
