"""Pixels made fewer by averaging over areas; by two cheaper steps where that gives the same picture. OpenCV.

Averaging at a ratio that is no whole number takes longer than decoding did. Bilinear at twice the size wanted, then means of two
by two pixels, takes a third of it, and differs from it by how far the ratio is from two and how sharp the picture is.
"""

from dataclasses import dataclass

import numpy as np

from fourmill.ingest.pixels import Pixels, Size

MAX_ERROR = 255**2 / 10**3.95
"""Mean square, in 8-bit steps, that is 39.5 dB: what a cheaper way may put in by its estimate. The aim is 38 dB."""

# Fitted from above on 82 photographs and on noise, text, edges and zone plates of 400 to 1000 pixels, at ratios of 1.02 to
# 3.1; tests/ingest/test_image_quality.py holds it.
_ERROR_OF_SHARPNESS = 0.008
_ERROR_OF_ROUNDING = 0.25  # twice to whole steps instead of once
_MAX_RATIO = 3.2
_SAMPLED_ROWS = 32


@dataclass(frozen=True)
class Detail:
    """Mean squares of differences in a picture, in 8-bit steps."""

    across: float  # of neighbours in a row
    down: float  # of neighbours in a column
    sharpness: float  # of second differences, both ways: how much of it is in the highest frequencies

    @classmethod
    def of(cls, rgb: Pixels) -> "Detail":
        """The detail of (H, W, 3), by some of its rows; infinite for a picture of fewer than three rows or columns."""
        height, width = rgb.shape[:2]
        if height < 3 or width < 3:
            return cls(np.inf, np.inf, np.inf)
        step = max(1, height // _SAMPLED_ROWS)
        rows, below, further = rgb[:-2:step], rgb[1:-1:step], rgb[2::step]
        across, across_2 = _difference(rows[:, 1:], rows[:, :-1]), _difference(rows[:, 2:], rows[:, :-2])
        down, down_on, down_2 = _difference(below, rows), _difference(further, below), _difference(further, rows)
        return cls(across, down, (4 * across - across_2 + 2 * (down + down_on) - down_2) / 2)


def reduce_to(rgb: Pixels, size: Size, detail: Detail | None = None, error: float = 0.0) -> Pixels:
    """Reduce (H, W, 3) to `size` (width, height) by averaging over areas, or so that it is as good (see `MAX_ERROR`).

    Args:
        detail: of the picture, where it is known.
        error: what an earlier step has put in, by its estimate.
    """
    if rgb.shape[1::-1] == size:
        return rgb
    import cv2

    twice = 2 * size[0], 2 * size[1]
    ratios = rgb.shape[1] / size[0], rgb.shape[0] / size[1]
    if 1 <= min(ratios) and max(ratios) <= _MAX_RATIO and rgb.shape[1::-1] != twice:
        sharpness = (detail or Detail.of(rgb)).sharpness
        off = max(abs(ratio - 2) for ratio in ratios)
        if error + _ERROR_OF_ROUNDING + _ERROR_OF_SHARPNESS * off * sharpness <= MAX_ERROR:
            rgb = np.asarray(cv2.resize(rgb, twice, interpolation=cv2.INTER_LINEAR), np.uint8)
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def _difference(one: Pixels, other: Pixels) -> float:
    import cv2

    return cv2.norm(one, other, cv2.NORM_L2SQR) / one.size
