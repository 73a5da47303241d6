"""What bench.labels works on: photographs made of blots, seeded networks, and the bare loop that the stage is compared with."""

import io
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fourmill.core.labels import decode_image
from fourmill.core.names import sample_key
from fourmill.core.shards import Item, Receipt, Recipe, ShardPlace, read_members, write_shard
from fourmill.core.store import Store, open_store
from fourmill.core.work import ShardJob
from fourmill.pseudolabel.config import DptConfig
from fourmill.pseudolabel.labeller import Labelled, Rejected
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.members import label_format
from fourmill.pseudolabel.worker import LabelWorker, label_recipe

DATASET = "bench"
SIDES = ((384, 288), (288, 384), (384, 384))  # (height, width): three buckets, as shapes of photographs come


def photo(height: int, width: int, seed: int) -> bytes:
    """A JPEG with structure of several sizes."""
    rng = np.random.default_rng([seed, height, width])
    total = np.zeros((height, width, 3))
    for side in (3, 9, 40):
        blots = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    sink = io.BytesIO()
    Image.fromarray((total / 3).astype(np.uint8)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def fill(store: Store, shards: range, samples: int, sides: Sequence[tuple[int, int]] = SIDES, first: int = 0) -> None:
    """Shards of images, the same few pictures again and again."""
    made = [photo(*sides[i % len(sides)], seed=i) for i in range(12)]
    for shard in shards:
        items = [Item(sample_key(shard * samples + i), ext="jpg", data=made[i % 12]) for i in range(samples)]
        place = ShardPlace(DATASET, "train", "images", shard)
        write_shard(store, place, Recipe(stage="images", code_version="1"), items, "bench")


def jobs(store: Store, label: str, config: Any, shards: range) -> list[ShardJob]:
    """One job a shard."""
    return [
        ShardJob("train", shard, label_recipe(store, DATASET, "train", shard, label, config), "bench")
        for shard in shards
    ]


def staged(root: str, label: str, config: dict[str, Any]) -> LabelWorker:
    """The stage's own worker: what an actor runs."""
    return LabelWorker(root, DATASET, label, DptConfig.model_validate(config))


def object_store_bytes() -> int:
    """Bytes that this Ray session's object stores have held so far, those that are gone again included.

    As each node's raylet counts them; no public interface of Ray tells. Values below 100 kB travel with their call instead.
    """
    import ray
    from ray._private.internal_api import node_stats

    nodes = [node for node in ray.nodes() if node["Alive"]]
    found = [node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False) for node in nodes]
    return sum(stats.store_stats.cumulative_created_bytes for stats in found)


def check_meter() -> None:
    """See that what is put into the object store is counted."""
    import ray

    before, size = object_store_bytes(), 1_000_000
    ray.put(bytes(size))
    assert object_store_bytes() - before >= size, "Ray does not count what its object store holds"


class BareLoop:
    """A shard by the plainest loop: decode, label by size in batches, encode, write. No thread but this one."""

    def __init__(self, root: str, label: str, config: Any) -> None:
        self._store = open_store(root)
        self._labeller: Any = make_labeller(label, config)
        self._format = label_format(label)

    def run(self, job: ShardJob) -> Receipt:
        """Label one shard."""
        members = list(read_members(self._store, ShardPlace(DATASET, job.split, "images", job.shard)))
        pictures = [decode_image(data) for _, data in members]
        buckets: dict[tuple[int, int], list[int]] = {}
        for index, picture in enumerate(pictures):
            buckets.setdefault(self._labeller.bucket(picture), []).append(index)
        encoded: dict[int, bytes] = {}
        for indices in buckets.values():
            for start in range(0, len(indices), self._labeller.batch_size):
                batch = indices[start : start + self._labeller.batch_size]
                for index, answer in zip(
                    batch, self._labeller.label_pictures([pictures[i] for i in batch]), strict=True
                ):
                    assert not isinstance(answer, Rejected)
                    encoded[index] = self._format.encode(answer.label if isinstance(answer, Labelled) else answer)
        items = [Item(key, ext=self._format.ext, data=encoded[i]) for i, (key, _) in enumerate(members)]
        return write_shard(
            self._store, ShardPlace(DATASET, job.split, "loop", job.shard), job.recipe, items, job.run_id
        )


class ThreadTime:
    """CPU seconds that functions take in the threads that call them: what other programs do does not count."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted under a name."""

        def counted(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.seconds[name] += time.thread_time() - start

        return counted
