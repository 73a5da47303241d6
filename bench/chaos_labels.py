"""Label a block on a small Ray cluster while its actors, its worker nodes and its driver are killed with SIGKILL.

The cluster is one machine's: a head without CPUs, and two worker nodes, either of which may be killed; another takes its
place. After every round the block must have the digests that a plain loop gives, no label twice, none missing. With
`--together` depth and normals are made by tiny networks, both from one decoding of each image.
"""

import argparse
import io
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from bench.report import report
from fourmill.core.ledger import write_ledger
from fourmill.core.names import SPLITS, Layout, sample_key
from fourmill.core.scene import render, sample_scene
from fourmill.core.shards import Item, Recipe, ShardPlace, need, read_members, write_shard
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob
from fourmill.pipelines.profiles import smallest
from fourmill.pseudolabel.choices import seeded_labellers
from fourmill.pseudolabel.worker import LabelWorker, label_recipe
from fourmill.runtime.actors import ShardRunner
from fourmill.runtime.project import Project, write_project
from fourmill.runtime.ray_session import RayConfig

TOGETHER = ("depth", "normal")
LAYOUT = Layout(rows_per_shard=40, shards_per_block=6, num_blocks=1)
SIDE_PX = 160  # some 20 ms a label
KINDS = ("actor", "node", "driver")
_DEADLINE_S = 300.0
_STARTS = 5
# By default a node is given up after half a minute.
_QUICK_TO_MISS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


class Stand:
    """A store with a block of images, what its labels should be, and a cluster to make them on.

    Several labels are of networks that are fed alike, so that the first one's stage makes the others along with it.
    """

    def __init__(self, folder: Path, labels: Sequence[str]) -> None:
        self.labels = labels
        self.num_alone = 0  # shards left to a later label's own stage, of rounds that ended
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        from ray.cluster_utils import Cluster

        self._file = folder / "project.json"
        head = {"num_cpus": 0, "_system_config": _QUICK_TO_MISS, "include_dashboard": False}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._new_node() for _ in range(2)]
        base = smallest(folder)
        ray = RayConfig(address=self._cluster.address, num_workers=3)
        networks = seeded_labellers() if len(labels) > 1 else {}
        labellers = {**base.labellers, **{label: networks[label] for label in labels if label in networks}}
        self.project = base.model_copy(update={"layout": LAYOUT, "ray": ray, "labellers": labellers})
        self.store = LocalStore(self.project.store)
        write_project(self.project, self._file)
        _fill(self.store, self.project)
        if networks:
            _one_thread()
        self._expected = {label: _by_a_plain_loop(self.store, self.project, label) for label in labels}

    def start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "bench.label_driver", str(self._file), *self.labels]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def clear(self) -> None:
        """Forget the labels of the last round."""
        for split in SPLITS:
            for path in (path for label in self.labels for path in (label, f"_ledger/{label}")):
                shutil.rmtree(Path(self.project.store) / self.project.dataset / split / path, ignore_errors=True)

    def wrong(self) -> list[str]:
        """Shards whose content differs from the plain loop's, or that lack a label or have one twice."""
        return [
            f"{label} {split} {shard}"
            for label, shards in self._expected.items()
            for (split, shard), expected in shards.items()
            if _content(self.store, self.project, label, split, shard) != expected
        ]

    def kill_node(self, rng: random.Random) -> bool:
        """Kill a worker node whole, and start another."""
        node = self._nodes.pop(rng.randrange(len(self._nodes)))
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.append(self._new_node())
        return True

    def _new_node(self) -> Any:
        for _ in range(_STARTS - 1):
            with suppress(Exception):  # Ray gives a node half a minute, which is short on a busy machine
                return self._cluster.add_node(num_cpus=2)
        return self._cluster.add_node(num_cpus=2)

    def kill_actor(self, rng: random.Random) -> bool:
        """Kill an actor that has a shard in its hands."""
        busy = busy_actors()
        with suppress(psutil.NoSuchProcess, IndexError):
            rng.choice(busy).kill()
            return True
        return False

    def stop(self) -> None:
        self._cluster.shutdown()


def _one_thread() -> None:
    """As many as Ray gives an actor of one CPU: a network's sums, and so its labels' last bits, depend on it."""
    import torch

    torch.set_num_threads(1)


def busy_actors() -> list[psutil.Process]:
    """Actors below this process that are making a shard."""
    title, found = f"ray::{ShardRunner.__name__}.run", []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if title in " ".join(one.cmdline()):
                found.append(one)
    return found


def _fill(store: LocalStore, project: Project) -> None:
    rng = np.random.default_rng(0)
    pictures: list[bytes] = []
    for _ in range(8):
        scene, sink = sample_scene(rng), io.BytesIO()
        comment = scene.model_dump_json().encode()
        Image.fromarray(render(scene, SIDE_PX).rgb_HWC).save(sink, "JPEG", quality=90, comment=comment)
        pictures.append(sink.getvalue())
    for shard in range(LAYOUT.shards_per_block):
        for split in SPLITS:
            rows = [row for row in LAYOUT.rows_of(shard) if (row % 4 == 0) == (split == "val")]
            items = [Item(sample_key(row), ext="jpg", data=pictures[row % 8]) for row in rows]
            recipe = Recipe(stage="images", code_version="1")
            write_shard(store, ShardPlace(project.dataset, split, "images", shard), recipe, items, "chaos")
    write_ledger(store, project.dataset, "images", "block_00", LAYOUT.shards_of("block_00"), "images", 0)


def _by_a_plain_loop(store: LocalStore, project: Project, label: str) -> dict[tuple[str, int], Any]:
    config = project.labellers[label]
    worker = LabelWorker(project.store, project.dataset, label, config)
    found: dict[tuple[str, int], Any] = {}
    for shard in range(LAYOUT.shards_per_block):
        for split in SPLITS:
            recipe = label_recipe(store, project.dataset, split, shard, label, config)
            worker.run(ShardJob(split, shard, recipe, "plain"))
            found[split, shard] = _content(store, project, label, split, shard)
            images = [key for key, _ in read_members(store, ShardPlace(project.dataset, split, "images", shard))]
            assert found[split, shard][1] == images, "one label an image, in order"
    worker.close()
    return found


def _content(store: LocalStore, project: Project, label: str, split: Any, shard: int) -> tuple[str, list[str]]:
    place = ShardPlace(project.dataset, split, label, shard)
    return need(store, place, label).content, [str(key) for key, _ in read_members(store, place)]


def disturbed(stand: Stand, kind: str, kills: int, rng: random.Random) -> tuple[int, list[str]]:
    """Rounds until something was killed so often; how often in the end, and what was wrong after any of them."""
    killed, wrong = 0, []
    while killed < kills:
        stand.clear()
        killed += _round(stand, kind, min(3, kills - killed), rng)
        wrong += [f"after {kind} {killed}: {shard}" for shard in stand.wrong()]
        print(f"{kind}: {killed} of {kills} kills, {len(wrong)} shards wrong", file=sys.stderr, flush=True)
    return killed, wrong


def _round(stand: Stand, kind: str, kills: int, rng: random.Random) -> int:
    """The block once, with at most so many kills; return how many there were."""
    deadline = time.monotonic() + _DEADLINE_S
    driver, killed = stand.start(), 0
    while killed < kills and _reaches(driver, lambda: bool(busy_actors()), deadline):
        if _ends_within(driver, rng.uniform(0, 0.6)):
            break
        if kind == "driver":
            driver.send_signal(signal.SIGKILL)
            driver.communicate()
            driver, killed = stand.start(), killed + 1
        else:
            killed += stand.kill_node(rng) if kind == "node" else stand.kill_actor(rng)
    said, complaint = driver.communicate(timeout=_DEADLINE_S)
    if driver.returncode != 0:
        raise SystemExit(f"the block was not finished after {killed} kills of its {kind}: {complaint[-3000:]}")
    told = [json.loads(line) for line in said.splitlines() if line.startswith("{")]  # Ray says something there, too
    assert len(told) == len(stand.labels), said
    stand.num_alone += sum(stage["made"] for stage in told[1:])
    return killed


def _reaches(driver: "subprocess.Popen[str]", state: Callable[[], bool], deadline: float) -> bool:
    while not state():
        if time.monotonic() > deadline:
            raise SystemExit(f"no actor took a shard within {_DEADLINE_S:.0f} s")
        if _ends_within(driver, 0.05):
            return False
    return True


def _ends_within(driver: "subprocess.Popen[str]", seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        driver.wait(seconds)
        return True
    return False


def main() -> None:
    """Run the test; exit code 1 when a digest differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--together", action="store_true", help="depth and normals from one decoding, not depth alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one kill of each kind")
    given = parser.parse_args()
    rng, rows, figures, wrong = random.Random(given.seed), [], {}, []
    with tempfile.TemporaryDirectory(prefix="fourmill-chaos-") as folder:
        stand = Stand(Path(folder), TOGETHER if given.together else TOGETHER[:1])
        try:
            for kind in given.kinds:
                killed, odd = disturbed(stand, kind, 1 if given.quick else given.kills, rng)
                rows.append((kind, killed, ", ".join(odd) or "as the plain loop's"))
                figures[f"kills_{kind}"] = killed
                wrong += odd
        finally:
            stand.stop()
    if given.together:
        figures["shards_of_normals_made_alone"] = stand.num_alone
    report("chaos_labels", ["killed", "times", "shards"], rows, {**figures, "shards_that_differ": len(wrong)})
    if wrong:
        print(json.dumps(wrong), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
