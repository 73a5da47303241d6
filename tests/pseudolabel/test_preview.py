"""Contact sheets as pictures: what a person reads off them."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fourmill.core.names import Layout, sample_key
from fourmill.core.scene import render, sample_scene
from fourmill.core.shards import Receipt
from fourmill.core.sheet import draw_text, text_width
from fourmill.core.store import Store
from fourmill.pseudolabel.config import SceneConfig
from fourmill.pseudolabel.preview import contact_sheet, label_preview

NO_SUCH_ROWS = [4, 5, 8, 10, 13, 21]


@pytest.fixture
def labelled(label_block: Callable[..., list[Receipt]], scenes: list[int]) -> list[str]:
    """Keys of the samples of block_00 that have depth, up to the last digit alike."""
    label_block("depth", SceneConfig())
    return [sample_key(row) for row in scenes]


def test_the_key_of_each_image_is_on_the_sheets(store: Store, layout: Layout, labelled: list[str]) -> None:
    others = [sample_key(row) for row in NO_SUCH_ROWS]
    preview = label_preview(store, "tiny", layout, "block_00", "depth")
    assert written([*labelled, *others], preview) == labelled
    rows = contact_sheet(store, "tiny", layout, "block_00", ["depth"], num=5)
    shown = written([*labelled, *others], rows)
    assert len(shown) == 5 and set(shown) < set(labelled)


@pytest.mark.parametrize("layout", [Layout(rows_per_shard=2, shards_per_block=5, num_blocks=1)])
def test_samples_are_spread_over_shards_of_which_there_are_fewer_than_two_a_sample(
    store: Store, layout: Layout, fill: Callable[..., None], label_block: Callable[..., list[Receipt]], jpeg: Any
) -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(5)]
    fill("block_00", {2 * i: jpeg(render(one, 32).rgb_HWC, one.model_dump_json()) for i, one in enumerate(scenes)})
    label_block("depth", SceneConfig())
    keys = [sample_key(2 * shard) for shard in range(5)]
    preview = label_preview(store, "tiny", layout, "block_00", "depth", num=3)
    assert written(keys, preview) == [keys[shard] for shard in (0, 1, 3)]


def written(words: Sequence[str], jpeg: bytes) -> list[str]:
    """Those that some part of a picture looks like, JPEG's noise aside."""
    sheet_HW = np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"), np.float64)
    return [one for one in words if least_difference(one, sheet_HW) < 8]


def least_difference(words: str, sheet_HW: np.ndarray) -> float:
    """Root of the mean squared difference to the part of a sheet that is nearest to the words."""
    image = Image.new("RGB", (text_width(words, 13), 14), "white")
    draw_text(ImageDraw.Draw(image), (0, 0), words, 13)
    text_hw = np.asarray(image.convert("L"), np.float64)
    cross, squares = correlated(sheet_HW, text_hw), correlated(sheet_HW**2, np.ones_like(text_hw))
    return float(np.sqrt(max(0.0, (squares - 2 * cross).min() + (text_hw**2).sum()) / text_hw.size))


def correlated(sheet_HW: np.ndarray, part_hw: np.ndarray) -> np.ndarray:
    """Sums of products with a part laid over each place of a sheet in which it fits."""
    product = np.fft.rfft2(sheet_HW) * np.fft.rfft2(part_hw, sheet_HW.shape).conj()
    return np.fft.irfft2(product, sheet_HW.shape)[: 1 - part_hw.shape[0], : 1 - part_hw.shape[1]]
