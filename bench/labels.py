"""The label stage: through Ray beside a bare loop, each labeller beside its network alone, memory over blocks. One run."""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.cost import cost_of, rss_mb
from bench.labels_work import DATASET, BareLoop, ThreadTime, fill, forward_of, jobs, photo
from bench.report import report
from fourmill.core.flow import Threads
from fourmill.core.labels import decode_image
from fourmill.core.names import sample_key
from fourmill.core.shards import ShardPlace, read_receipt
from fourmill.core.store import LocalStore
from fourmill.core.work import no_progress
from fourmill.pseudolabel.config import ClipConfig, DetectorConfig, DptConfig, Mask2FormerConfig
from fourmill.pseudolabel.items import label_items
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.members import label_format
from fourmill.pseudolabel.worker import LabelWorker
from fourmill.runtime.pool import run_shards
from fourmill.runtime.ray_session import RayConfig, ensure_ray, stop_ray

RAY = RayConfig(num_workers=1)  # as many as the bare loop is
WEIGHTS = "seeded:0"
# Tiny networks, fed so large that they take what real ones take on a GPU, or longer.
CONFIGS: dict[str, Any] = {
    "depth": DptConfig(weights=WEIGHTS, longer_px=736, batch_size=4),
    "semseg": Mask2FormerConfig(weights=WEIGHTS, shorter_px=512, longer_px=853, batch_size=4),
    "det": DetectorConfig(weights=WEIGHTS, input_px=640, batch_size=4),
    "clip": ClipConfig(weights=WEIGHTS, patch_px=16, channels=64, batch_size=16),
}
# Of real size: what --networks names, fed as the paper's labellers are.
REAL: dict[str, Any] = {
    "depth": DptConfig(weights=WEIGHTS, batch_size=1),
    "semseg": Mask2FormerConfig(weights=WEIGHTS, batch_size=1),
    "det": DetectorConfig(weights=WEIGHTS, batch_size=1),
    "clip": ClipConfig(weights=WEIGHTS, batch_size=1),
}
SIDES = (256, 320)  # (height, width) of an image as CC12M's are stored; what a network is fed follows from its config
NAMES = {"depth": "dpt", "semseg": "mask2former", "det": "detector", "clip": "clip"}


def through_ray(
    root: str, shards: int, samples: int, rounds: int, meanwhile: Callable[[], None]
) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """CPU and wall time of the stage on a Ray actor, and of the bare loop here, in turns.

    Args:
        meanwhile: done once Ray is up and before anything is measured: its own processes start for half a minute.
    """
    store, config = LocalStore(root), CONFIGS["depth"]
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
    costs = [(cost_of(bare), cost_of(spread)) for _ in range(rounds)]
    stop_ray()
    for shard in range(shards):
        receipts = [read_receipt(store, ShardPlace(DATASET, "train", folder, shard)) for folder in ("loop", "depth")]
        assert len({receipt.tar_sha256 for receipt in receipts if receipt}) == 1, "the two sides made other bytes"
    images = shards * samples
    sides = [
        (statistics.median(c.cpu_s for c in side), statistics.median(c.wall_s for c in side))
        for side in zip(*costs, strict=True)
    ]
    rows = [
        (name, f"{1e3 * cpu / images:.1f} CPU ms", f"{1e3 * wall / images:.1f} ms an image")
        for name, (cpu, wall) in zip(("bare loop", "Ray stage, one actor"), sides, strict=True)
    ]
    (bare_cpu, bare_wall), (ray_cpu, ray_wall) = sides
    return rows, {"cpu_cost_ratio_ray": ray_cpu / bare_cpu, "wall_ratio_ray": ray_wall / bare_wall}


def share_of_forward(label: str, config: Any, images: int, rounds: int) -> tuple[tuple[Any, ...], float, float]:
    """Rate of a labeller, with decoding and encoding beside it, as a share of its network's alone at the same sizes.

    And the network's share of its thread's CPU time, which holds on a busy machine too.
    """
    import torch

    data = [photo(*SIDES, seed) for seed in range(images)]
    crops = np.stack([decode_image(one).rgb_HWC[:224, :224] for one in data])
    labeller: Any = make_features(config) if label == "clip" else make_labeller(label, config)
    size = min(config.batch_size, images)
    height, width = (224, 224) if label == "clip" else labeller.bucket(decode_image(data[0]))
    padding = (32, 32) if label == "semseg" else (1, 1)
    pixels = torch.rand(size, 3, height + -height % padding[0], width + -width % padding[1])
    forward, threads, spent = forward_of(labeller, label), Threads(2), ThreadTime()
    labeller._forward = spent.of("network", labeller._forward)
    features = spent.of("all", labeller) if label == "clip" else None
    if features is None:
        labeller.label_pictures = spent.of("all", labeller.label_pictures)

    @torch.inference_mode()
    def alone(num: int = images) -> None:
        for _ in range(num // size):
            forward(pixels)

    def staged(num: int = images) -> None:
        if features is not None:
            features(crops[:num])
            return
        members = ((sample_key(i), one) for i, one in enumerate(data[:num]))
        made = list(label_items(threads, members, labeller, label_format(label)))
        assert all(item.status == "ok" for item in made)

    alone(size)  # first calls choose kernels
    staged(size)
    spent.seconds.clear()
    times = [(_wall(alone), _wall(staged)) for _ in range(rounds)]
    threads.close()
    network, all_of_it = (statistics.median(side) for side in zip(*times, strict=True))
    cpu_share = spent.seconds["network"] / spent.seconds["all"]
    beside = f"{images / network:.3g} images/s by the network alone; {cpu_share:.3f} of its thread's CPU time"
    return (NAMES[label], f"{images / all_of_it:.3g} images/s", beside), network / all_of_it, cpu_share


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


def _wall(work: Any) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller rounds; ends within a minute")
    parser.add_argument(
        "--networks", type=Path, help="folder with depth/, semseg/, det/, clip/ of real size, for the shares"
    )
    parser.add_argument("--images", type=int, help="images for each of the shares, in one round")
    parser.add_argument("--only", choices=["shares"], help="leave out Ray and memory")
    given = parser.parse_args()
    quick = given.quick
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # the actor imports bench.labels_work
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it in an actor with one CPU
    import torch

    torch.set_num_threads(1)
    rows: list[tuple[Any, ...]] = []
    figures: dict[str, float] = {}
    if given.only is None:
        with tempfile.TemporaryDirectory(prefix="fourmill-bench-") as folder:
            rows, figures = of_the_stage(folder, quick)
    amount = (given.images, 1) if given.images else (4, 2) if quick else (64, 5)
    for label, config in (REAL if given.networks else CONFIGS).items():
        if given.networks:
            config = config.model_copy(update={"weights": str(given.networks / label)})
        row, share, cpu_share = share_of_forward(label, config, *amount)
        rows.append(row)
        figures |= {f"share_of_forward_{NAMES[label]}": share, f"cpu_share_of_forward_{NAMES[label]}": cpu_share}
    report("labels", ["what", "how much", "beside"], rows, figures)


if __name__ == "__main__":
    main()
