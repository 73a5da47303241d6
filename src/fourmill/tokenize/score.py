"""Figures of a tokenizer on held-out samples, and what the training set's mean or most common map would score."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core import metrics
from fourmill.core.labels import COCO_PANOPTIC, COCO_THINGS
from fourmill.tokenize.config import ImageLabel

HEADLINES: dict[ImageLabel, tuple[str, str]] = {
    "rgb": ("psnr_db", "higher"),
    "depth": ("l1_standardised", "lower"),
    "normal": ("degrees", "lower"),
    "semseg": ("miou", "higher"),
    "clip": ("r2", "higher"),
}
"""The figure that stands for each label, and which way is better."""


def figures(
    label: ImageLabel, predicted: NDArray[Any], true: NDArray[Any], semseg_BHW: NDArray[np.uint8]
) -> dict[str, float]:
    """Figures by name, rounded to 4 digits.

    Args:
        predicted: labels as stored, unpacked; `true` alike.
        semseg_BHW: classes of the same samples: depth and normals are also scored on things alone.
    """
    things = semseg_BHW < len(COCO_THINGS)
    if label == "rgb":
        found = {"psnr_db": metrics.psnr_db(predicted, true)}
    elif label == "depth":
        found = {"l1_standardised": metrics.depth_error(predicted, true)}
        if things.any():
            found["l1_standardised_things"] = metrics.depth_error(predicted, true, things)
    elif label == "normal":
        found = {"degrees": metrics.normal_error_degrees(predicted, true)}
        if things.any():
            found["degrees_things"] = metrics.normal_error_degrees(predicted, true, things)
    elif label == "semseg":
        ious = metrics.class_ious(predicted, true)
        found = {"miou": float(np.mean(list(ious.values())))} | {f"iou/{_name(c)}": v for c, v in ious.items()}
    else:
        found = {"r2": metrics.feature_r2(predicted, true), "cosine": metrics.feature_cosine(predicted, true)}
    return {name: round(float(value), 4) for name, value in found.items()}


def baseline_map(label: ImageLabel, train: NDArray[Any]) -> NDArray[Any]:
    """What looking at nothing would give: the per-pixel mean, or most common class, of a training set."""
    if label == "semseg":
        return metrics.most_common_map(train)
    finite_B = np.isfinite(train).all(tuple(range(1, train.ndim)))  # a training skips what is not
    mean = metrics.mean_map(train[finite_B])
    return np.rint(mean).astype(np.uint8) if label == "rgb" else mean


def _name(class_id: int) -> str:
    return COCO_PANOPTIC[class_id].removesuffix("-merged").replace(" ", "_")
