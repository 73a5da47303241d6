"""A contact sheet of one label of one block: a few images, each beside its label."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core.labels import decode_image
from fourmill.core.names import SPLITS, Layout
from fourmill.core.pictures import (
    boxes_picture,
    depth_picture,
    fit_picture,
    grid_png,
    normal_picture,
    semseg_legend,
    semseg_picture,
    text_picture,
)
from fourmill.core.shards import ShardPlace, read_members
from fourmill.core.store import Store
from fourmill.pseudolabel.members import label_format

_MAX_BYTES = 60_000  # it goes into an event's row
_CELL_PX = 128
# Tried in turn until the sheet is small enough: side of a cell, colours.
_SIZES = ((_CELL_PX, None), (_CELL_PX, 256), (112, 128), (96, 96), (80, 64), (64, 32), (48, 16))
_TITLES = {"depth": ["depth"], "normal": ["normals"], "semseg": ["classes", ""], "det": ["boxes"]}


def label_preview(store: Store, dataset: str, layout: Layout, block: str, label: str, num: int = 8) -> bytes:
    """PNG under 60 kB: images of the block beside their label in colour, with the names of classes or boxes.

    Samples are spread evenly over the first shards that have any; a block without labels gives a line of text.

    Raises:
        ValueError: no such block or label.
    """
    samples = _choose(store, dataset, layout, block, label, num)
    if not samples:
        words = text_picture(f"no {label} labels in {block}", 2 * _CELL_PX, _CELL_PX)
        return grid_png([[words]], [label], cell_px=2 * _CELL_PX)
    sheet = b""
    for cell_px, colours in _SIZES:
        cells = [_cells(image, data, label, cell_px) for image, data in samples]
        rows = [cells[i] + (cells[i + 1] if i + 1 < len(cells) else []) for i in range(0, len(cells), 2)]
        titles = ["image", *_TITLES[label]] * (2 if len(cells) > 1 else 1)
        sheet = grid_png(rows, titles, cell_px=cell_px, colours=colours)
        if len(sheet) < _MAX_BYTES:
            break
    return sheet


def _choose(store: Store, dataset: str, layout: Layout, block: str, label: str, num: int) -> list[tuple[bytes, bytes]]:
    """Bytes of images and of their labels."""
    chosen: list[tuple[bytes, bytes]] = []
    for split in SPLITS:
        for shard in layout.shards_of(block):
            members = list(read_members(store, ShardPlace(dataset, split, label_format(label).folder, shard)))
            wanted = min(num - len(chosen), len(members))
            picked = dict(members[i * len(members) // wanted] for i in range(wanted))
            images = read_members(store, ShardPlace(dataset, split, "images", shard)) if picked else ()
            chosen += [(data, picked[key]) for key, data in images if key in picked]
            if len(chosen) == num:
                return chosen
    return chosen


def _cells(image: bytes, data: bytes, label: str, cell_px: int) -> list[NDArray[np.uint8] | None]:
    rgb = fit_picture(decode_image(image).rgb_HWC, cell_px)
    found: Any = label_format(label).decode(data)
    match label:
        case "depth":
            return [rgb, depth_picture(found)]
        case "normal":
            return [rgb, normal_picture(found)]
        case "semseg":
            # By the nearest pixel: mixed colours would be other classes.
            rows, columns = (
                np.arange(shown) * full // shown for shown, full in zip(rgb.shape, found.shape, strict=False)
            )
            near = found[rows[:, None], columns]
            return [rgb, semseg_picture(near), semseg_legend(found, cell_px, cell_px)]
        case _:
            return [rgb, boxes_picture(rgb, found, scale=1)]
