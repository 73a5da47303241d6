"""How far a prediction is from its label, and what a constant map would score. numpy only; all over a batch of maps.

What no library has: the normals' mean angle and the L1 of standardised depth of the paper's Table 31, usage and perplexity
of codebooks. mIoU, PSNR, SSIM, cosine and R2 are torchmetrics', in `tokenize.score`. B maps, H x W pixels, C channels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourmill.core.modality import SEMSEG_INVALID

Floats = NDArray[np.floating]

USAGE_WINDOW = 65_536  # tokens that codebook usage is counted over
DEPTH_TAIL = 0.1  # share of pixels left out at either end when depth is standardised
DEPTH_EPS = 1e-6  # added to its variance
_EPS = 1e-6


def standardise_depth(depth_BHW: Floats) -> NDArray[np.float32]:
    """Depth less its mean over its deviation, per map, both without the lowest and highest tenth of its pixels.

    The public code's truncated standardisation: unbiased variance, 1e-6 added under the root. Depth from one image is
    known up to scale and shift only, so this is what tokenizers see and what is compared.
    """
    flat_BN = np.sort(depth_BHW.reshape(len(depth_BHW), -1).astype(np.float64), axis=1)
    cut = int(flat_BN.shape[1] * DEPTH_TAIL)
    core_BN = flat_BN[:, cut : flat_BN.shape[1] - cut]
    mean_B11 = core_BN.mean(1)[:, None, None]
    scale_B11 = np.sqrt(core_BN.var(1, ddof=1) + DEPTH_EPS)[:, None, None]
    return ((depth_BHW - mean_B11) / scale_B11).astype(np.float32)


def depth_error(predicted_BHW: Floats, true_BHW: Floats, counted_BHW: NDArray[np.bool_] | None = None) -> float:
    """Mean absolute difference of standardised depth; scale and shift of either do not matter.

    Args:
        counted_BHW: pixels to average over; all by default. Maps are standardised as a whole in any case.

    Raises:
        ValueError: no pixel to count.
    """
    _same(predicted_BHW, true_BHW)
    difference_BHW = np.abs(standardise_depth(predicted_BHW) - standardise_depth(true_BHW))
    counted = difference_BHW if counted_BHW is None else difference_BHW[counted_BHW]
    if not counted.size:
        raise ValueError("no pixel to count; the depth error is undefined")
    return float(counted.mean(dtype=np.float64))


def normal_error_degrees(
    predicted_BHWC: Floats, true_BHWC: Floats, valid_BHW: NDArray[np.bool_] | None = None
) -> float:
    """Mean angle between normals in degrees, 0..180, over the pixels whose true normal is not zero.

    Args:
        valid_BHW: pixels to count; all by default.

    Raises:
        ValueError: no pixel to count.
    """
    _same(predicted_BHWC, true_BHWC)
    lengths = np.linalg.norm(predicted_BHWC, axis=-1), np.linalg.norm(true_BHWC, axis=-1)
    cosine = (predicted_BHWC * true_BHWC).sum(-1) / np.maximum(lengths[0] * lengths[1], _EPS)
    counted = lengths[1] > 0.5 if valid_BHW is None else valid_BHW & (lengths[1] > 0.5)
    if not counted.any():
        raise ValueError("no pixel with a true normal; the angle is undefined")
    return float(np.degrees(np.arccos(np.clip(cosine[counted], -1, 1))).mean())


@dataclass(frozen=True)
class CodebookUse:
    """How much of a codebook a set of tokens uses."""

    usage: float  # share of codewords that occur in a window of 65,536 tokens, mean over windows, 0..1
    perplexity: float  # exp of the entropy over all: the number of codewords were they equally likely


def codebook_use(tokens: NDArray[np.integer], codebook_size: int) -> CodebookUse:
    """Usage in the public code's windows, and perplexity. Fewer tokens than a window are one; a rest is left out of usage.

    Raises:
        ValueError: a token is outside the codebook, or there is none.
    """
    if not tokens.size or tokens.min() < 0 or tokens.max() >= codebook_size:
        raise ValueError(f"tokens must be a non-empty set of ids 0..{codebook_size - 1}; found shape {tokens.shape}")
    flat_N = tokens.reshape(-1).astype(np.int64)
    whole = flat_N.size // USAGE_WINDOW * USAGE_WINDOW or flat_N.size
    windows = flat_N[:whole].reshape(-1, min(USAGE_WINDOW, whole))
    return CodebookUse(
        usage=float(np.mean([len(np.unique(window)) for window in windows]) / codebook_size),
        perplexity=perplexity(np.bincount(flat_N, minlength=codebook_size)),
    )


def perplexity(counts: NDArray[np.integer]) -> float:
    """Exp of the entropy of what was counted; 0 where nothing was."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if shares.size else 0.0


def mean_map(maps_BHW: Floats) -> NDArray[np.float32]:
    """Per-pixel mean of a training set: the baseline that looks at nothing. Any trailing axes."""
    return maps_BHW.mean(0, dtype=np.float64).astype(np.float32)


def most_common_map(ids_BHW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Per-pixel most common class of a training set, invalid pixels left out (the lowest id wins ties)."""
    classes = [int(c) for c in np.unique(ids_BHW) if c != SEMSEG_INVALID]
    if not classes:
        raise ValueError("no valid pixel in the class maps; there is no most common class")
    counts_KHW = np.stack([(ids_BHW == c).sum(0) for c in classes])
    return np.array(classes, np.uint8)[counts_KHW.argmax(0)]


def _same(predicted: NDArray[np.generic], true: NDArray[np.generic]) -> None:
    if predicted.shape != true.shape or not true.size:
        raise ValueError(
            f"prediction of shape {predicted.shape} against truth of shape {true.shape}: they must be equal"
        )
