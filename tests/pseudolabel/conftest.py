import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fourmill.core.labels import Picture
from fourmill.core.names import SPLITS, Layout, Split, sample_key
from fourmill.core.scene import Scene, render, sample_scene
from fourmill.core.shards import Item, Receipt, Recipe, ShardPlace, write_shard
from fourmill.core.store import LocalStore, Store
from fourmill.core.work import ShardJob
from fourmill.pseudolabel.config import AnyLabellerConfig
from fourmill.pseudolabel.worker import LabelWorker, label_recipe

DATASET = "tiny"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small are no faster on two threads, and far slower when another program wants the second core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photo() -> Callable[[int, int, int], np.ndarray]:
    """Something like a photograph: (height, width, seed) to (H, W, 3) uint8, blots of several sizes."""

    def make(height: int, width: int, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng([seed, height, width])
        total = np.zeros((height, width, 3))
        for side in (2, 5, 13):
            blots = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
            total += np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC), np.float64)
        return (total / 3).astype(np.uint8)

    return make


@pytest.fixture
def scene() -> Scene:
    """A scene with at least one solid in view."""
    return sample_scene(np.random.default_rng(3))


@pytest.fixture
def scene_picture(scene: Scene) -> Picture:
    return Picture(render(scene, 48).rgb_HWC, scene.model_dump_json())


@pytest.fixture
def jpeg() -> Callable[..., bytes]:
    def encode(rgb: np.ndarray, comment: str | None = None) -> bytes:
        sink = io.BytesIO()
        options: dict[str, Any] = {"comment": comment.encode()} if comment else {}
        Image.fromarray(rgb).save(sink, "JPEG", quality=95, **options)
        return sink.getvalue()

    return encode


@pytest.fixture
def layout() -> Layout:
    return Layout(rows_per_shard=10, shards_per_block=2, num_blocks=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def fill(store: Store, layout: Layout) -> Callable[[str, dict[int, bytes | None]], None]:
    """Write a block's images by row number, None for a row that failed; odd rows go to the validation split."""

    def write(block: str, images: dict[int, bytes | None]) -> None:
        for shard in layout.shards_of(block):
            for parity, split in enumerate(SPLITS):
                rows = [row for row in layout.rows_of(shard) if row in images and row % 2 == parity]
                items = [
                    Item(sample_key(row), ext="jpg", data=data)
                    if (data := images[row]) is not None
                    else Item(sample_key(row), "http_404", "gone")
                    for row in rows
                ]
                place = ShardPlace(DATASET, split, "images", shard)
                write_shard(store, place, Recipe(stage="images", code_version="1"), items, "run")

    return write


@pytest.fixture
def scenes(fill: Callable[..., None], jpeg: Callable[..., bytes]) -> list[int]:
    """Seven generated scenes in block_00, and a row that failed upstream; the rows that have an image."""
    rng = np.random.default_rng(0)
    images: dict[int, bytes | None] = {4: None}
    for row in (0, 1, 2, 3, 11, 12, 15):
        drawn = sample_scene(rng)
        images[row] = jpeg(render(drawn, 32).rgb_HWC, drawn.model_dump_json())
    fill("block_00", images)
    return sorted(row for row in images if images[row])


@pytest.fixture
def label_block(store: Store, layout: Layout) -> Callable[[str, AnyLabellerConfig], list[Receipt]]:
    """Label all shards of block_00, without Ray: (label, config) to their receipts."""

    def make(label: str, config: AnyLabellerConfig) -> list[Receipt]:
        worker = LabelWorker(store.root, DATASET, label, config)
        places: list[tuple[Split, int]] = [(split, shard) for shard in layout.shards_of("block_00") for split in SPLITS]
        recipes = [label_recipe(store, DATASET, *place, label, config) for place in places]
        receipts = [worker.run(ShardJob(*place, recipe, "run")) for place, recipe in zip(places, recipes, strict=True)]
        worker.close()
        return receipts

    return make
