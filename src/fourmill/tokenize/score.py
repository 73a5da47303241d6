"""Figures of a tokenizer on held-out samples, and what the training set's mean or most common map would score.

The metrics of the paper's Table 31, with PSNR and SSIM for images and cosine and R2 for features. What torchmetrics has is
torchmetrics'; angles of normals and L1 of standardised depth are `core.metrics`'.
"""

# B maps, H x W pixels, C channels

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torchmetrics.functional import cosine_similarity, r2_score
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from fourmill.core import metrics
from fourmill.core.coco import COCO_PANOPTIC, COCO_THINGS
from fourmill.core.labels import are_no_classes
from fourmill.core.modality import NUM_SEMSEG_CLASSES, SEMSEG_INVALID
from fourmill.tokenize.config import NUM_CLASS_ROWS, ImageLabel
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.train_set import LabelArrays, centre_squares, spread, unpack

HEADLINES: dict[ImageLabel, tuple[str, str]] = {
    "rgb": ("psnr_db", "higher"),
    "depth": ("l1_standardised", "lower"),
    "normal": ("degrees", "lower"),
    "semseg": ("miou", "higher"),
    "clip": ("r2", "higher"),
}
"""The figure that stands for each label, and which way is better."""

_EQUAL_DB = 100.0  # PSNR of equal images, which have none
_SSIM_PX = 11  # side of its filter
_PART = 64  # images whose SSIM is computed at a time: its filters take five copies of them


@dataclass(frozen=True)
class Scored:
    """A tokenizer on the held-out samples."""

    figures: dict[str, float]
    true: NDArray[Any]
    tokens: NDArray[np.int16]
    predicted: NDArray[Any]


def score_model(model: ImageTokenizer, labels: LabelArrays, label: ImageLabel) -> Scored:
    """Tokenize and decode the held-out samples; the model's mode stays what it is."""
    true = unpack(labels.eval, label)
    tokens = model.tokenize(true)
    predicted = model.detokenize(tokens)
    return Scored(figures(label, predicted, true, labels.eval_semseg), true, tokens, predicted)


def baseline_figures(label: ImageLabel, labels: LabelArrays, true: NDArray[Any]) -> dict[str, float]:
    """Figures of the training set's mean or most common map, brought to the held-out samples' side."""
    return figures(label, _baseline(label, labels, true), true, labels.eval_semseg)


def scored_report(scored: Scored, labels: LabelArrays, label: ImageLabel, codebook_size: int) -> dict[str, Any]:
    """What a report says of a tokenizer's quality: figures, baseline, headline, usage and perplexity of the codebook."""
    use = metrics.codebook_use(scored.tokens, codebook_size)
    baseline = baseline_figures(label, labels, scored.true)
    return {
        "figures": scored.figures,
        "baseline": baseline,
        "headline": headline(label, scored.figures, baseline),
        "usage": round(use.usage, 4),
        "perplexity": round(use.perplexity, 1),
    }


def headline(label: ImageLabel, found: dict[str, float], baseline: dict[str, float]) -> dict[str, Any]:
    """The figure that a tokenizer is judged by: name, value, baseline, and whether higher or lower is better."""
    name, better = HEADLINES[label]
    return {"name": name, "value": found[name], "baseline": baseline[name], "better": better}


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
        found = {"psnr_db": psnr_db(predicted, true), "ssim": ssim(predicted, true)}
    elif label == "depth":
        found = {"l1_standardised": metrics.depth_error(predicted, true)}
        if things.any():
            found["l1_standardised_things"] = metrics.depth_error(predicted, true, things)
    elif label == "normal":
        found = {"degrees": metrics.normal_error_degrees(predicted, true)}
        if things.any():
            found["degrees_things"] = metrics.normal_error_degrees(predicted, true, things)
    elif label == "semseg":
        ious = class_ious(predicted, true)
        found = {"miou": float(np.mean(list(ious.values())))} | {f"iou/{_name(c)}": v for c, v in ious.items()}
    else:
        found = {"r2": feature_r2(predicted, true), "cosine": feature_cosine(predicted, true)}
    return {name: round(float(value), 4) for name, value in found.items()}


def psnr_db(predicted_BHWC: NDArray[np.uint8], true_BHWC: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of 8-bit images in dB: mean over images of each image's own ratio, 100 where equal.

    Raises:
        ValueError: shapes differ, or there is no image, as in the others here; or images of another type than uint8.
    """
    predicted, true = _images(predicted_BHWC, true_BHWC)
    ratios_B = peak_signal_noise_ratio(predicted, true, data_range=255.0, reduction="none", dim=(1, 2, 3))
    return float(ratios_B.clamp(max=_EQUAL_DB).mean())


def ssim(predicted_BHWC: NDArray[np.uint8], true_BHWC: NDArray[np.uint8]) -> float:
    """Structural similarity of 8-bit images, mean over images, at most 1.

    Raises:
        ValueError: images of less than 11 pixels a side, which its filter has, or of another type than uint8.
    """
    predicted, true = (x.movedim(-1, 1) for x in _images(predicted_BHWC, true_BHWC))
    if min(true.shape[2:]) < _SSIM_PX:
        raise ValueError(
            f"images of {true.shape[3]} x {true.shape[2]} pixels, expected {_SSIM_PX} a side or more for SSIM"
        )
    parts = [
        structural_similarity_index_measure(p, t, data_range=255.0, reduction="none")
        for p, t in zip(predicted.split(_PART), true.split(_PART), strict=True)
    ]
    return float(torch.cat([torch.as_tensor(part).reshape(-1) for part in parts]).mean())


def class_ious(predicted_BHW: NDArray[np.uint8], true_BHW: NDArray[np.uint8]) -> dict[int, float]:
    """Intersection over union by raw class id over the whole batch, for every class that the truth holds.

    Pixels whose truth is none (255) do not count.

    Raises:
        ValueError: the truth holds no valid pixel, or either an id that is no class.
    """
    _same_shape(predicted_BHW, true_BHW)
    for what, ids_BHW in (("prediction", predicted_BHW), ("truth", true_BHW)):
        _check_classes(what, ids_BHW)
    present = [int(c) for c in np.unique(true_BHW) if c != SEMSEG_INVALID]
    if not present:
        raise ValueError("no valid pixel in the true class maps; IoU is undefined")
    predicted, true = (
        torch.from_numpy(ids + np.uint8(1)).long() for ids in (predicted_BHW, true_BHW)
    )  # 255 wraps to 0
    with _counting():
        ious_K = multiclass_jaccard_index(predicted, true, NUM_CLASS_ROWS, average="none", ignore_index=0)
    return {c: float(ious_K[c + 1]) for c in present}


def feature_cosine(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> float:
    """Mean cosine over the last axis, -1..1."""
    predicted_NC, true_NC = (x.flatten(0, -2) for x in _pair(predicted, true))
    return float(cosine_similarity(predicted_NC, true_NC, reduction="mean"))


def feature_r2(predicted: NDArray[np.floating], true: NDArray[np.floating]) -> float:
    """Share of the features' variance (around each channel's mean) that the prediction explains; at most 1."""
    predicted_NC, true_NC = (x.flatten(0, -2).double() for x in _pair(predicted, true))
    return float(r2_score(predicted_NC, true_NC, multioutput="variance_weighted"))


def baseline_map(label: ImageLabel, train: NDArray[Any]) -> NDArray[Any]:
    """What looking at nothing would give: the per-pixel mean, or most common class, of a training set."""
    if label == "semseg":
        return metrics.most_common_map(train)
    finite_B = np.isfinite(train).all(tuple(range(1, train.ndim)))  # a training skips what is not
    mean = metrics.mean_map(train[finite_B])
    return np.rint(mean).astype(np.uint8) if label == "rgb" else mean


@contextmanager
def _counting() -> Generator[None]:
    """Leave a training's deterministic mode, where torchmetrics counts through a matrix of pixels by pairs of classes. Counts
    of integers are the same in either.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _pair(predicted: NDArray[Any], true: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    _same_shape(predicted, true)
    return torch.tensor(predicted).float(), torch.tensor(true).float()


def _images(predicted: NDArray[np.uint8], true: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
    if predicted.dtype != np.uint8 or true.dtype != np.uint8:
        raise ValueError(f"images are {predicted.dtype} and {true.dtype}, expected uint8 of both: 255 is their peak")
    return _pair(predicted, true)


def _same_shape(predicted: NDArray[Any], true: NDArray[Any]) -> None:
    if predicted.shape != true.shape or not true.size:
        raise ValueError(
            f"prediction of shape {predicted.shape} against truth of shape {true.shape}: they must be equal, and not empty"
        )


def _check_classes(what: str, ids_BHW: NDArray[np.uint8]) -> None:
    wrong = are_no_classes(ids_BHW)
    if ids_BHW.dtype != np.uint8 or wrong.any():
        found = f"class {ids_BHW[wrong][0]}" if wrong.any() else f"classes as {ids_BHW.dtype}"
        raise ValueError(
            f"the {what} holds {found}, expected uint8 in 0..{NUM_SEMSEG_CLASSES - 1}, or {SEMSEG_INVALID} for none"
        )


def _name(class_id: int) -> str:
    return COCO_PANOPTIC[class_id].removesuffix("-merged").replace(" ", "_")


def _baseline(label: ImageLabel, labels: LabelArrays, true: NDArray[Any]) -> NDArray[Any]:
    """The training set's mean or most common map at the held-out samples' side, for each of them."""
    side = true.shape[1]
    if label != "clip":
        found = baseline_map(label, np.concatenate([*centre_squares(labels, label, side)]))
        return np.broadcast_to(found, true.shape)
    found = baseline_map(label, unpack(spread(labels.train), label))
    if side != found.shape[0]:
        map_1CHW = torch.from_numpy(found).movedim(-1, 0)[None]
        found = F.interpolate(map_1CHW, size=(side, side), mode="bilinear", antialias=True)[0].movedim(0, -1).numpy()
    return np.broadcast_to(found, true.shape)
