"""Labels as the store holds them: folder, member format, and the figures that each row of the ledger keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fourmill.core import labels as formats
from fourmill.core.labels import Box
from fourmill.core.modality import NUM_SEMSEG_CLASSES

Figures = dict[str, float]

ROW_EXTRA = pa.schema(
    [
        ("width", pa.int32()),  # of the image and its label, in pixels
        ("height", pa.int32()),
        ("figures", pa.map_(pa.string(), pa.float64())),
    ]
)
"""What the label stage adds to each row."""


@dataclass(frozen=True)
class LabelFormat:
    """How one label is kept."""

    folder: str
    ext: str
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    figures: Callable[[Any], Figures]


def _depth_figures(depth_HW: np.ndarray) -> Figures:
    clamped = float(((depth_HW <= 0) | (depth_HW >= 1)).mean())
    return {"least": float(depth_HW.min()), "most": float(depth_HW.max()), "mean": float(depth_HW.mean())} | {
        "clamped": clamped
    }


def _normal_figures(normal_HWC: np.ndarray) -> Figures:
    length_HW = np.linalg.norm(normal_HWC, axis=-1)
    return {"length": float(length_HW.mean()), "unit": float((np.abs(length_HW - 1) < 0.05).mean())}


def _semseg_figures(ids_HW: np.ndarray) -> Figures:
    counts = np.bincount(ids_HW.ravel(), minlength=NUM_SEMSEG_CLASSES)
    return {f"class_{i:03d}": float(counts[i] / ids_HW.size) for i in np.flatnonzero(counts)}


def _box_figures(boxes: list[Box]) -> Figures:
    figures: Figures = {"boxes": float(len(boxes))}
    for box in boxes:
        figures[box.class_name] = figures.get(box.class_name, 0.0) + 1
    return figures


FORMATS: dict[str, LabelFormat] = {
    "depth": LabelFormat("depth", "png", formats.encode_depth, formats.decode_depth, _depth_figures),
    "normal": LabelFormat("normal", "png", formats.encode_normal, formats.decode_normal, _normal_figures),
    "semseg": LabelFormat("semseg", "png", formats.encode_semseg, formats.decode_semseg, _semseg_figures),
    "det": LabelFormat("boxes", "json", formats.encode_boxes, formats.decode_boxes, _box_figures),
}
"""By label."""


def label_format(label: str) -> LabelFormat:
    """How a label is kept. Raises ValueError for one that is not stored."""
    if label not in FORMATS:
        raise ValueError(f"no stored label {label!r}; there are {', '.join(FORMATS)}")
    return FORMATS[label]
