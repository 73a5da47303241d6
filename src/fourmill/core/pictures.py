"""Labels and features as pictures for people: colours, frames, legends. Nothing that a network reads.

Every function that ends in `_picture` or `_legend` returns (H, W, 3) uint8; so does what `features_painter` gives.
`core.sheet` lays such pictures out in a grid.
"""

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fourmill.core.coco import COCO_PANOPTIC
from fourmill.core.labels import Box
from fourmill.core.modality import SEMSEG_INVALID
from fourmill.core.sheet import draw_text, text_width

__all__ = [
    "boxes_picture",
    "depth_picture",
    "features_painter",
    "nearest_pixels",
    "normal_picture",
    "painter_of",
    "semseg_legend",
    "semseg_picture",
]

RGB = NDArray[np.uint8]

# Ten anchors of the viridis map; equal steps of depth look equally large, also to the colour-blind.
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 74, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (109, 205, 89),
        (180, 222, 44),
        (253, 231, 37),
    ],
    np.float32,
)

# What most pictures are full of gets the colour one expects; the demo's three solids must not be confused.
_FAMILIAR = {
    "person": (220, 60, 70),
    "suitcase": (235, 140, 40),
    "sports ball": (200, 50, 120),
    "bottle": (90, 60, 190),
    "sky-other-merged": (150, 200, 245),
    "grass-merged": (120, 180, 80),
    "tree-merged": (50, 120, 60),
    "sea": (40, 110, 180),
    "water-other": (70, 140, 200),
    "road": (125, 120, 130),
    "pavement-merged": (170, 160, 165),
    "floor-other-merged": (200, 185, 150),
    "building-other-merged": (160, 110, 90),
    "mountain-merged": (140, 130, 100),
    "snow": (235, 240, 248),
    "wall-other-merged": (215, 205, 190),
}


def nearest_pixels(map_HW: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """A map (H, W, ...) at another size by its nearest pixels above and to the left, none of them mixed: classes stay classes."""
    rows, columns = (np.arange(size) * full // size for size, full in zip((height, width), map_HW.shape, strict=False))
    return map_HW[rows[:, None], columns]


def depth_picture(depth_HW: NDArray[Any]) -> RGB:
    """Depth in colour, any range: the map's nearest is yellow, its farthest violet.

    Args:
        depth_HW: depth, far is large; values that are not finite become black.
    """
    depth = depth_HW.astype(np.float32)
    known = np.isfinite(depth)
    low = float(depth[known].min()) if known.any() else 0.0
    high = float(depth[known].max()) if known.any() else 1.0
    share = np.clip((np.where(known, depth, low) - low) / max(high - low, 1e-9), 0, 1)
    at = (1 - share) * (len(_VIRIDIS) - 1)
    below = np.minimum(at.astype(np.int64), len(_VIRIDIS) - 2)
    part = (at - below)[..., None]
    colours = _VIRIDIS[below] * (1 - part) + _VIRIDIS[below + 1] * part
    return np.where(known[..., None], np.rint(colours), 0).astype(np.uint8)


def normal_picture(normal_HWC: NDArray[Any]) -> RGB:
    """Normals in colour: each component of [-1, 1] becomes a channel of [0, 255]."""
    shown = np.nan_to_num(normal_HWC.astype(np.float32), nan=-1.0)
    return np.rint(np.clip((shown + 1) * 127.5, 0, 255)).astype(np.uint8)


def semseg_picture(ids_HW: NDArray[np.uint8]) -> RGB:
    """Classes in colour, always the same for a class; invalid pixels are black."""
    return _PALETTE[ids_HW]


def semseg_legend(ids_HW: NDArray[np.uint8], width: int, height: int) -> RGB:
    """The classes of a map with their colours, names and shares, the largest first, as many as there is room for."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    ids, counts = np.unique(ids_HW, return_counts=True)
    line = 13
    order = np.argsort(-counts, kind="stable")[: max(1, height // line)]
    for row, index in enumerate(order):
        top, class_id = row * line + 1, int(ids[index])
        name = "invalid" if class_id == SEMSEG_INVALID else COCO_PANOPTIC[class_id]
        share = 100 * int(counts[index]) / ids_HW.size
        draw.rectangle((1, top, 10, top + 9), fill=_colour(_PALETTE[class_id]))
        percent = f"{share:.0f}%" if share >= 0.5 else "<1%"
        draw_text(draw, (14, top - 1), f"{name.removesuffix('-merged')} {percent}", 10)
    return np.asarray(image)


def boxes_picture(rgb_HWC: RGB, boxes: Sequence[Box], scale: int | None = None) -> RGB:
    """An image with a thin frame and a short label for each box.

    Args:
        rgb_HWC: the image, (H, W, 3) uint8.
        boxes: in any order. Labels do not cover each other: where there is no room, the less sure have none.
        scale: enlargement, so that the labels stay readable; by default the least that gives a side of 128 pixels.
    """
    height, width = rgb_HWC.shape[:2]
    times = scale or max(1, -(-128 // max(height, width)))
    size = (width * times, height * times)
    image = Image.fromarray(np.ascontiguousarray(rgb_HWC)).resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    surest_first = sorted(boxes, key=lambda b: -b.score)
    across, down = size[0] - 1, size[1] - 1
    spans = [(b.xmin * across, b.ymin * down, b.xmax * across, b.ymax * down) for b in surest_first]
    colours = [_colour(_PALETTE[_CLASS_IDS.get(b.class_name, SEMSEG_INVALID)]) for b in surest_first]
    for span, colour in zip(reversed(spans), reversed(colours), strict=True):
        draw.rectangle(span, outline=colour, width=2)
    taken: list[tuple[float, float, float]] = []
    for box, (left, top, _, bottom), colour in zip(surest_first, spans, colours, strict=True):
        text = box.class_name if box.score == 1 else f"{box.class_name} {box.score:.2f}"
        label_width = text_width(text, 10) + 3
        x = max(0.0, min(left, size[0] - label_width - 1))
        y = _free_height((top - 12, top, bottom - 12, bottom), x, label_width, size[1], taken)
        if y is not None:
            taken.append((x, y, label_width))
            draw.rectangle((x, y, x + label_width, y + 12), fill=colour)
            draw_text(draw, (x + 2, y), text, 10, "white" if sum(colour) < 420 else "black")
    return np.asarray(image)


def features_painter(truth: NDArray[Any]) -> Callable[[NDArray[Any]], RGB]:
    """What draws feature maps (h, w, C) that stand side by side, so that equal features have equal colours in all of them.

    A map's own strongest directions may change places with another's however near the two are, and so would their colours.

    Args:
        truth: features (..., C), whose three strongest directions (PCA) become red, green and blue, over their range.
    """
    flat = np.nan_to_num(truth.reshape(-1, truth.shape[-1]).astype(np.float64))
    centre = flat.mean(0)
    directions = np.linalg.svd(flat - centre, full_matrices=False)[2][:3]
    # A direction's sign is arbitrary: fixing it keeps the colours of equal maps equal.
    strongest = np.abs(directions).argmax(1)
    directions = directions * np.sign(directions[np.arange(len(directions)), strongest])[:, None]
    low, high = np.percentile((flat - centre) @ directions.T, (2, 98), axis=0)

    def paint(features_hwC: NDArray[Any]) -> RGB:
        values = (np.nan_to_num(features_hwC.astype(np.float64)) - centre) @ directions.T
        shown = np.zeros((*features_hwC.shape[:2], 3))
        shown[..., : len(directions)] = (values - low) / np.maximum(high - low, 1e-9)
        return np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)

    return paint


def painter_of(label: str, truth: NDArray[Any]) -> Callable[[NDArray[Any]], RGB]:
    """What draws an image label's maps: depth, normal and semseg alike everywhere, rgb as it is, clip in colours of the truth."""
    known: dict[str, Callable[[NDArray[Any]], RGB]] = {
        "rgb": lambda rgb: rgb,
        "depth": depth_picture,
        "normal": normal_picture,
        "semseg": semseg_picture,
    }
    return known[label] if label in known else features_painter(truth)


def _free_height(
    heights: Sequence[float], x: float, width: float, picture_height: int, taken: Sequence[tuple[float, float, float]]
) -> float | None:
    """The first height where a label of 12 pixels lies in the picture and on no other label."""
    for y in heights:
        inside = 0 <= y <= picture_height - 12
        if inside and all(abs(y - v) > 12 or x > u + w or u > x + width for u, v, w in taken):
            return y
    return None


def _make_palette() -> RGB:
    palette = np.zeros((256, 3), np.uint8)
    for class_id, name in enumerate(COCO_PANOPTIC):
        hue = class_id * 0.618033988749895 % 1  # neighbours in the list land far apart on the circle
        saturation, value = (0.6, 0.75, 0.45)[class_id % 3], (0.9, 0.75, 0.6)[class_id // 3 % 3]
        drawn = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
        palette[class_id] = _FAMILIAR.get(name, drawn)
    return palette


def _colour(value: NDArray[np.uint8]) -> tuple[int, int, int]:
    return int(value[0]), int(value[1]), int(value[2])


_PALETTE = _make_palette()
_CLASS_IDS = {name: i for i, name in enumerate(COCO_PANOPTIC)}
