"""What Ray adds: the same shards in a plain loop and on Ray actors, CPU time of everything, in turns, one run."""

import argparse
import io
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from bench.ray_work import ThumbnailWorker
from bench.report import report
from fourmill.core.names import sample_key
from fourmill.core.shards import Item, Recipe, ShardPlace, read_receipt, write_shard
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob, no_progress
from fourmill.runtime.pool import run_shards
from fourmill.runtime.ray_session import RayConfig, ensure_ray, stop_ray

CONFIG = RayConfig(num_workers=2)
RECIPE = Recipe(stage="bench", code_version="1")


def _fill(store: LocalStore, shards: int, samples: int) -> None:
    rng = np.random.default_rng(0)
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).resize((640, 480)).save(sink, "JPEG", quality=88)
    for shard in range(shards):
        items = [Item(sample_key(shard * samples + i), ext="jpg", data=sink.getvalue()) for i in range(samples)]
        write_shard(store, ShardPlace("bench", "train", "images", shard), RECIPE, items, "bench")


def _cpu_seconds() -> float:
    """User and system time of this process and all below it, those that have ended included."""
    here = psutil.Process()
    used = 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        used += times.user + times.system
    ended = os.times()
    return used + ended.children_user + ended.children_system


def _measure(work: Callable[[], None]) -> float:
    start = _cpu_seconds()
    work()
    return _cpu_seconds() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds; ends within a minute")
    quick = parser.parse_args().quick
    shards, samples, rounds = (6, 60, 3) if quick else (12, 200, 5)
    jobs = [ShardJob("train", shard, RECIPE, "bench") for shard in range(shards)]
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # the actors import bench.ray_work
    with tempfile.TemporaryDirectory(prefix="fourmill-bench-") as root:
        store = LocalStore(root)
        _fill(store, shards, samples)
        worker = ThumbnailWorker(root, "loop")
        start_up = _measure(lambda: ensure_ray(CONFIG))

        def loop() -> None:
            for job in jobs:
                worker.run(job)

        def spread() -> None:
            run_shards("bench.ray_work:ThumbnailWorker", {"root": root, "folder": "ray"}, jobs, CONFIG, no_progress)

        spread()  # actors start and import once a session
        times = [(_measure(loop), _measure(spread)) for _ in range(rounds)]
        digests = [
            {folder: read_receipt(store, ShardPlace("bench", "train", folder, job.shard)) for folder in ("loop", "ray")}
            for job in jobs
        ]
        assert all(d["loop"] and d["ray"] and d["loop"].tar_sha256 == d["ray"].tar_sha256 for d in digests)
        stop_ray()
    plain, ray = (statistics.median(side) for side in zip(*times, strict=True))
    rows = [("plain loop", plain, plain / shards / samples * 1e3), ("Ray actors", ray, ray / shards / samples * 1e3)]
    rows.append(("Ray start-up, once", start_up, 0.0))
    report(
        "ray",
        ["runner", "CPU s", "CPU ms an image"],
        rows,
        {"cpu_cost_ratio_ray": ray / plain, "start_up_cpu_s": start_up},
    )


if __name__ == "__main__":
    main()
