"""This project's side of bench.ingest, and what its parts cost alone; each a program of its own."""

import asyncio
import json
import multiprocessing
import os
import ssl
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil

from bench.ingest_sides import Task, write_clock
from bench.ingest_site import HOST
from fourmill.core.digest import digest_bytes
from fourmill.core.names import Layout
from fourmill.core.process import collect_rarely
from fourmill.core.store import open_store
from fourmill.core.work import ShardJob
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.ingest.image import ImageError, normalise
from fourmill.ingest.pixels import use_one_thread
from fourmill.ingest.source import build_source_index
from fourmill.ingest.worker import ImageWorker, images_recipe


def _config(task: Task) -> IngestConfig:
    return IngestConfig(
        concurrency=task.concurrency,
        # One host has all rows here, and img2dataset bounds none: no row waits for a turn.
        per_host=4 * task.concurrency,
        retries=0,
        max_side_px=task.side_px,
        allow_hosts=(HOST,),
        ca_file=task.authorities if task.base.startswith("https") else None,
    )


def _number(task: Task, rows_per_shard: int) -> tuple[str, Layout]:
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "list.tsv"
    path.write_text("".join(f"{url}\ta picture\n" for url in task.urls()))
    layout = Layout(rows_per_shard=rows_per_shard, shards_per_block=-(-task.rows // rows_per_shard), num_blocks=1)
    root = str(folder / "store")
    build_source_index(open_store(root), "bench", SourceConfig(list=str(path), val_fraction=0), layout)
    return root, layout


def _work(root: str, layout: Layout, task: Task, shard: int) -> None:
    use_one_thread()
    import simplejpeg  # noqa: F401 # as img2dataset, which has imported its decoder by now

    config = _config(task)
    with ImageWorker(root, "bench", layout, config) as worker:
        collect_rarely()  # as actors do, once
        begin, cpu_s = time.monotonic(), time.process_time()
        recipe = images_recipe(open_store(root), "bench", config, "train", shard)
        receipt = worker.run(ShardJob("train", shard, recipe, "bench"))
    write_clock(task.folder, shard, begin, cpu_s)
    Path(task.folder, f"counts-{shard}.json").write_text(json.dumps(receipt.counts))


def run(task: Task) -> None:
    """Number the list, then make its shards, each in a process of its own as an actor would."""
    root, layout = _number(task, task.rows_per_shard)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(root, layout, task, shard)) for shard in range(layout.shards_per_block)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(f"a worker failed: exit codes {[worker.exitcode for worker in workers]}")
    counts = Counter[str]()
    for path in Path(task.folder).glob("counts-*.json"):
        counts.update(json.loads(path.read_text()))
    assert counts.total() == task.rows
    Path(task.folder, "counts.json").write_text(json.dumps(counts))


def alone(task: Task, plan: str) -> dict[str, float]:
    """CPU seconds a URL of bare fetching and of the codec, each by as many processes at once as the workers are."""
    parts = [(task, plan, part) for part in range(task.processes)]
    with multiprocessing.get_context("spawn").Pool(task.processes) as pool:
        return {what.__name__: sum(pool.starmap(what, parts, chunksize=1)) / task.rows for what in (_fetch, _codec)}


def _fetch(task: Task, plan: str, part: int) -> float:
    """A bare aiohttp session that reads every body of its part and does nothing with it."""

    async def all_of() -> None:
        tls = ssl.create_default_context(cafile=task.authorities) if task.base.startswith("https") else True
        connector = aiohttp.TCPConnector(limit=task.concurrency, ssl=tls)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one(url: str) -> None:
                with suppress(aiohttp.ClientError):
                    async with session.get(url) as response:
                        await response.read()

            await asyncio.gather(*[one(url) for url in task.urls()[part :: task.processes]])

    start = time.process_time()
    asyncio.run(all_of())
    return time.process_time() - start


def _codec(task: Task, plan: str, part: int) -> float:
    """`normalise` and sha256 over the bodies of its part, those that arrive."""
    use_one_thread()
    config, answers = _config(task), json.loads(Path(plan).read_text())[part :: task.processes]
    bodies = [Path(file).read_bytes() for kind, file in answers if kind in ("ok", "slow")]
    normalise(bodies[0], config)  # imports
    start = time.process_time()
    for body in bodies:
        with suppress(ImageError):
            digest_bytes(normalise(body, config).jpeg)
    return time.process_time() - start


def memory(task: Task) -> dict[str, list[float]]:
    """Resident MB of one worker after each shard of a thousand rows."""
    root, layout = _number(task, 1000)
    config, store, here = _config(task), open_store(root), psutil.Process(os.getpid())
    curve: list[float] = []
    with ImageWorker(root, "bench", layout, config) as worker:
        collect_rarely()
        for shard in range(layout.shards_per_block):
            recipe = images_recipe(store, "bench", config, "train", shard)
            worker.run(ShardJob("train", shard, recipe, "bench"))
            curve.append(round(here.memory_info().rss / 1e6, 1))
    return {"rss_mb": curve}


if __name__ == "__main__":
    name, given, *rest = sys.argv[1:]
    found = {"run": run, "alone": alone, "memory": memory}[name](Task(**json.loads(given)), *rest)
    if found is not None:
        print(json.dumps(found))
