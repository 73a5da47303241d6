"""The label stage: through Ray beside a bare loop, each labeller beside its network alone, memory over blocks. One run."""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cost import cost_of, rss_mb
from bench.full_size import make_networks
from bench.labels_shares import LARGE, ON_A_GPU, REAL, TINY, WEIGHTS, Amount, shares
from bench.labels_work import DATASET, BareLoop, check_meter, fill, jobs, object_store_bytes
from bench.report import report
from fourmill.core.shards import ShardPlace, read_receipt
from fourmill.core.store import LocalStore
from fourmill.core.work import no_progress
from fourmill.pseudolabel.config import DptConfig
from fourmill.pseudolabel.worker import LabelWorker
from fourmill.runtime.pool import run_shards
from fourmill.runtime.ray_session import RayConfig, ensure_ray, stop_ray

RAY = RayConfig(num_workers=1)  # as many as the bare loop is
MOST_BYTES = 1000  # an image in the object store: its path, if anything


def through_ray(
    root: str, shards: int, samples: int, rounds: int, meanwhile: Callable[[], None]
) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """CPU and wall time of the stage on a Ray actor, and of the bare loop here, in turns; and what passed through Ray's store.

    Args:
        meanwhile: done once Ray is up and before anything is measured: its own processes start for half a minute.
    """
    store, config = LocalStore(root), TINY["depth"]
    fill(store, range(shards), samples)
    work = jobs(store, "depth", config, range(shards))
    loop = BareLoop(root, "depth", config)
    ensure_ray(RAY)
    arguments = {"root": root, "label": "depth", "config": config.model_dump(mode="json")}

    def bare() -> None:
        for job in work:
            loop.run(job)

    def spread() -> None:
        run_shards("bench.labels_work:staged", arguments, work, RAY, no_progress)

    run_shards(
        "bench.labels_work:staged", arguments, work[:1], RAY, no_progress
    )  # the actor imports, the network loads
    loop.run(work[0])
    meanwhile()
    check_meter()
    held = object_store_bytes()
    costs = [(cost_of(bare), cost_of(spread)) for _ in range(rounds)]
    held = object_store_bytes() - held
    stop_ray()
    for shard in range(shards):
        receipts = [read_receipt(store, ShardPlace(DATASET, "train", folder, shard)) for folder in ("loop", "depth")]
        assert len({receipt.tar_sha256 for receipt in receipts if receipt}) == 1, "the two sides made other bytes"
    images = shards * samples
    held_per_image = held / (rounds * images)
    assert held_per_image < MOST_BYTES, f"{held_per_image:.0f} bytes an image went through the object store"
    sides = [
        (statistics.median(c.cpu_s for c in side), statistics.median(c.wall_s for c in side))
        for side in zip(*costs, strict=True)
    ]
    rows = [
        (name, f"{1e3 * cpu / images:.1f} CPU ms", f"{1e3 * wall / images:.1f} ms an image")
        for name, (cpu, wall) in zip(("bare loop", "Ray stage, one actor"), sides, strict=True)
    ]
    rows.append(("Ray's object store", f"{held_per_image:.1f} bytes an image", f"at most {MOST_BYTES}"))
    (bare_cpu, bare_wall), (ray_cpu, ray_wall) = sides
    return rows, {
        "cpu_cost_ratio_ray": ray_cpu / bare_cpu,
        "wall_ratio_ray": ray_wall / bare_wall,
        "object_store_bytes_per_image": held_per_image,
    }


def memory_over_blocks(root: str, blocks: int, shards: int, samples: int) -> tuple[tuple[Any, ...], float]:
    """RSS of a worker after its first block, and after its last."""
    store, config = LocalStore(root), DptConfig(weights=WEIGHTS, longer_px=96)
    fill(store, range(shards), samples, sides=((96, 64), (64, 96), (96, 96)))
    worker, work = LabelWorker(root, DATASET, "depth", config), jobs(store, "depth", config, range(shards))
    seen: list[float] = []
    for _ in range(blocks):
        for job in work:
            worker.run(job)
        seen.append(rss_mb())
    worker.close()
    settled = seen[blocks // 3]  # allocators keep what the first blocks needed
    return (f"memory over {blocks} blocks", f"{settled:.0f} MB", f"{seen[-1]:.0f} MB in the end"), seen[-1] - settled


def of_the_stage(folder: str, quick: bool) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """What Ray adds, and memory over blocks."""
    rows: list[tuple[Any, ...]] = []
    figures: dict[str, float] = {}

    def memory() -> None:
        row, figures["rss_growth_mb"] = memory_over_blocks(f"{folder}/memory", *((6, 2, 30) if quick else (12, 8, 200)))
        rows.append(row)

    sides, ratios = through_ray(f"{folder}/ray", *((2, 12, 3) if quick else (4, 96, 5)), memory)
    return [*sides, *rows], {**ratios, **figures}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds; ends within a minute")
    parser.add_argument(
        "--networks", type=Path, help="folder with depth/, semseg/, det/, clip/ of real size, for the shares"
    )
    parser.add_argument(
        "--full-size", action="store_true", help="make such networks with random weights, and feed them"
    )
    parser.add_argument("--labels", nargs="*", help="labellers to take the share of, of those above, normal and vitdet")
    parser.add_argument("--images", type=int, help="images for each of the shares, in one round")
    parser.add_argument(
        "--actors", type=int, help="that share the GPU (or the cores); by default the profile's on a GPU, else one"
    )
    parser.add_argument("--only", choices=["shares"], help="leave out Ray and memory")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # the actor imports bench.labels_work
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it in an actor with one CPU
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fourmill-bench-") as folder:
        rows, figures = ([], {}) if given.only else of_the_stage(folder, given.quick)
        found, shared = of_the_networks(given, Path(folder))
    report("labels", ["what", "how much", "beside"], rows + found, figures | shared)


def of_the_networks(given: argparse.Namespace, folder: Path) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """Shares of the networks' own rates: tiny ones, or those of real size, on a GPU where there is one."""
    import torch

    is_real, is_cuda = given.networks is not None or given.full_size, torch.cuda.is_available()
    configs = (ON_A_GPU if is_cuda else REAL) if is_real else TINY
    configs = {label: configs[label] for label in given.labels or configs}
    amount = Amount(given.images, 1) if given.images else Amount(*((4, 2) if given.quick else (64, 5)))
    if is_real and is_cuda:
        amount = Amount(given.images or 256, 2, LARGE, os.cpu_count() or 2)
    amount = replace(amount, actors=given.actors or (None if is_cuda else 1))
    networks = given.networks
    if given.full_size:
        networks = folder / "networks"
        torch.set_num_threads(os.cpu_count() or 1)
        make_networks(networks, tuple(configs))
        torch.set_num_threads(1)
    return shares(configs, networks, amount)


if __name__ == "__main__":
    main()
